"""Taking routers off a model again: its classes, hooks and keys are those it had before."""

from torch import nn

from megaskip.arch.adapters import detach_adapters
from megaskip.arch.decoder import find_decoder
from megaskip.arch.sublayer import RoutedSublayer
from megaskip.routing import PREFIX


def detach_routers(model: nn.Module) -> None:
    """Take the routers off `model`, and adapters with them: its classes, hooks and keys are those
    it had before."""
    parts = find_decoder(model)
    for module in parts.decoder.modules():
        if is_routed(module):
            unroute(module)
    detach_adapters(model)
    _unwire(parts.decoder)
    if "_skip_base" in vars(model):  # its generate() was another one, too
        unroute(model)
    if hasattr(model, PREFIX):
        delattr(model, PREFIX)


def is_routed(module: nn.Module) -> bool:
    """Return whether a sublayer asks a gate."""
    return isinstance(module, RoutedSublayer)


def unroute(module: nn.Module) -> None:
    """Give a routed sublayer its own class back."""
    base = module._skip_base
    for name in [name for name in vars(module) if name.startswith("_skip_")]:
        del module.__dict__[name]
    module.__class__ = base  # type: ignore[assignment]


def _unwire(decoder: nn.Module) -> None:
    """Take the hooks off a decoder."""
    for handle in decoder.__dict__.pop("_skip_hooks", ()):
        handle.remove()
    decoder.__dict__.pop("_skip_routers", None)
