"""Whether a decoder must be told which tokens are padding, found out by running it. Knows no
engine.

Rows are padded on the right. Where attention is causal no real token can see what comes after it,
so a mask changes nothing but the time: with one, kernels of plain causal attention do not apply.
"""

import contextlib

import torch
from torch import nn

from megaskip.routing import Routers

_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Of the norm of the real tokens' hidden states. Kernels with a mask and without it round
differently on a GPU; padding that is seen changes the states by tenths."""
_TOLERANCE_16_BIT = 5e-2


def needs_mask(model: nn.Module, routers: Routers | None = None) -> bool:
    """Return whether padding on the right of a row changes its real tokens when no mask hides it.

    Runs `model`, a decoder or a causal LM in evaluation mode, on two short rows with a mask and
    without; `routers`, if it has any, let everything run meanwhile. Under ZeRO-3 collective: every
    rank calls it. Whoever runs a model on rows padded on the right asks once, before the first.
    """
    with contextlib.nullcontext() if routers is None else routers.disabled():
        return _is_seen(model)


@torch.no_grad()
def _is_seen(model: nn.Module) -> bool:
    device = next(tensor for tensor in (*model.parameters(), *model.buffers())).device
    ids = torch.arange(1, 2 * _TOKENS + 1, device=device).reshape(2, _TOKENS)
    places = torch.arange(_TOKENS, device=device).expand(2, _TOKENS)
    real = places < torch.tensor([[_TOKENS], [_TOKENS // 2]], device=device)
    masked = model(input_ids=ids, attention_mask=real.long(), use_cache=False)[0][real].float()
    plain = model(input_ids=ids, attention_mask=None, use_cache=False)[0][real].float()
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_16_BIT)
    # Written so that NaN keeps the mask.
    return not bool((plain - masked).norm() <= tolerance * masked.norm())
