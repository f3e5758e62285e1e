"""megaskip: a frozen language model learns what it can skip (Router-Tuning, arXiv 2410.13184).

    routers = attach_routers(model, RouterConfig(granularity="attn_sequence", capacity=0.5))
    out = model(input_ids, attention_mask=attention_mask, labels=labels)
    (out.loss + routers.penalty()).backward()      # only routers.parameters() have gradients

Importing this package touches no device, no environment variable and no process group.
"""

from megaskip._version import __version__
from megaskip.arch import attach_routers, detach_routers
from megaskip.checkpoint import load_routers, save_routers
from megaskip.config import RouterConfig
from megaskip.routing import RouterSet

__all__ = [
    "RouterConfig",
    "RouterSet",
    "__version__",
    "attach_routers",
    "detach_routers",
    "load_routers",
    "save_routers",
]
