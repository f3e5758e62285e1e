"""Whether a decoder must be told which tokens are padding, found out by running it. Knows no
engine.

Rows are padded on the right. Where attention is causal no real token can see what comes after it,
so a mask changes nothing but the time: with one, kernels of plain causal attention do not apply.
"""

import torch
from torch import nn

_TOKENS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Of the norm of the real tokens' hidden states. Kernels with a mask and without it round
differently on a GPU; padding that is seen changes the states by tenths."""
_TOLERANCE_16_BIT = 5e-2


@torch.no_grad()
def needs_mask(model: nn.Module) -> bool:
    """Return whether padding on the right of a row changes its real tokens when no mask hides it.

    Runs `model`, a decoder or a causal LM in evaluation mode, on two short rows with a mask and
    without. Under ZeRO-3 collective: every rank calls it.
    """
    device = next(tensor for tensor in (*model.parameters(), *model.buffers())).device
    ids = torch.arange(1, 2 * _TOKENS + 1, device=device).reshape(2, _TOKENS)
    places = torch.arange(_TOKENS, device=device).expand(2, _TOKENS)
    real = places < torch.tensor([[_TOKENS], [_TOKENS // 2]], device=device)
    masked = model(input_ids=ids, attention_mask=real.long(), use_cache=False)[0][real].float()
    plain = model(input_ids=ids, attention_mask=None, use_cache=False)[0][real].float()
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_16_BIT)
    # Written so that NaN keeps the mask.
    return not bool((plain - masked).norm() <= tolerance * masked.norm())
