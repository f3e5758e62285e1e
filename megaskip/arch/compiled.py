"""torch.compile of the decoder layers that have no router, each a region of its own. Knows no
engine.

Routed layers branch in Python on what was decided, so they stay as they are.
"""

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.routing import Routers

_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the norm of the hidden states: fused kernels add up in another order, TF32 rounds to 1e-3."""
_TOLERANCE_16_BIT = 5e-2
COMPILER_ERRORS = (
    *(RuntimeError, AssertionError, ImportError, OSError),
    *(TypeError, AttributeError, KeyError, ValueError),
)
"""What a compiler raises that does not know a layer, or does not find a C++ compiler or Triton."""


def compile_layers(model: nn.Module, routers: Routers, *, backend: str = "inductor") -> str:
    """Compile the layers of `model` without a router in place (nn.Module.compile), and return what
    was done, for the log.

    A short pass compares hidden states with and without. Where compiling fails, or states differ,
    the layers stay as they were, and the text says why.
    """
    layers = find_decoder(model).layers
    chosen = [layer for index, layer in enumerate(layers) if index not in routers.layers]
    if not chosen:
        return "nothing is compiled: every layer has a router"
    eager = _states(model, routers)
    for layer in chosen:
        layer.compile(backend=backend)
    try:
        problem = _difference(_states(model, routers), eager, next(model.parameters()).dtype)
    except COMPILER_ERRORS as error:
        problem = in_short(error)
    if problem is None:
        return f"{len(chosen)} layers without a router are compiled"
    for layer in chosen:
        layer._compiled_call_impl = None  # what compile() sets
    return f"--compile is left out, layers run as they are ({problem})"


def in_short(error: Exception) -> str:
    """Return what a compiler says, which may be pages, in a line for the log."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _difference(states: Tensor, eager: Tensor, dtype: torch.dtype) -> str | None:
    error = float((states - eager).norm() / eager.norm())
    # Written so that NaN is a difference.
    if error <= _TOLERANCE.get(dtype, _TOLERANCE_16_BIT):
        return None
    return f"compiled layers compute something else: relative distance {error:.1e}"


@torch.no_grad()
def _states(model: nn.Module, routers: Routers) -> Tensor:
    device = next(model.parameters()).device
    ids = torch.arange(1, 2 * _TOKENS + 1, device=device).reshape(2, _TOKENS)
    with routers.disabled():
        states: Tensor = find_decoder(model).decoder(input_ids=ids, use_cache=False)[0]
    return states.float()
