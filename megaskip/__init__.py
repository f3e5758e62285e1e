"""megaskip: a frozen language model learns what it can skip (Router-Tuning, arXiv 2410.13184).

    routers = attach_routers(model, RouterConfig(granularity="attn_sequence", capacity=0.5))
    out = model(input_ids, attention_mask=attention_mask, labels=labels)
    (out.loss + routers.penalty()).backward()      # only routers.parameters() have gradients

Importing this package touches no device, no environment variable and no process group, and names
that need torch are imported when they are asked for: `megaskip --help` must not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megaskip._version import __version__
from megaskip.config import RouterConfig

if TYPE_CHECKING:
    from megaskip.api import calibrate, convert, export_static, load_for_inference
    from megaskip.arch import attach_routers, detach_routers
    from megaskip.checkpoint import load_routers, save_routers
    from megaskip.integrations import route_tune
    from megaskip.routing import RouterSet

__all__ = [
    "RouterConfig",
    "RouterSet",
    "__version__",
    "attach_routers",
    "calibrate",
    "convert",
    "detach_routers",
    "export_static",
    "load_for_inference",
    "load_routers",
    "route_tune",
    "save_routers",
]
_HOMES = {
    "RouterSet": "megaskip.routing",
    "attach_routers": "megaskip.arch",
    "calibrate": "megaskip.api",
    "convert": "megaskip.api",
    "detach_routers": "megaskip.arch",
    "export_static": "megaskip.api",
    "load_for_inference": "megaskip.api",
    "load_routers": "megaskip.checkpoint",
    "route_tune": "megaskip.integrations",
    "save_routers": "megaskip.checkpoint",
}
"""Where the names of `if TYPE_CHECKING` are."""


def __getattr__(name: str) -> Any:
    """Return a public name, imported from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
