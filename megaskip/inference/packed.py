"""Attention among the kept tokens of each row: packed to the left, so that less is computed.

Shapes: B rows, T tokens of this call, q kept tokens of the row that keeps most, L slots of the
cache, D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from megaskip.inference.kept import KeptTokens
from megaskip.routing.executor import Kwargs, Run
from megaskip.routing.kept_units import put_back


def attend_among_kept(
    run: Run, hidden_states: Tensor, kwargs: Kwargs, kept: Tensor, cache_layer: KeptTokens | None
) -> Any:
    """Run attention on the tokens of `kept` bool [B, T], which see each other alone.

    Returns its output tuple, zero for the others. `cache_layer` is the layer's; None without one.
    """
    tokens = kept.shape[1]
    count = kept.cpu().sum(1)
    width = int(count.max())
    seen = cache_layer._skip_seen if cache_layer is not None else 0
    if cache_layer is not None:
        cache_layer.advance(tokens)
    if not width:
        return torch.zeros_like(hidden_states), None
    even = bool((count == width).all())
    index = None if tokens == 1 or (even and width == tokens) else _kept_first(kept, width)
    position = _position(kept, index) + seen
    if not even:
        position = torch.where(kept if index is None else kept.gather(1, index), position, -1)
    slots = position if cache_layer is None else cache_layer.expect(position, count)
    whole = even if cache_layer is None else cache_layer.appends
    picked = kwargs if index is None else _picked(kwargs, index, kept.shape)
    if not whole or not _serves(kwargs.get("attention_mask"), width, slots, seen + tokens):
        mask = _mask(kwargs.get("attention_mask"), index, position, slots, seen + tokens)
        picked = {**picked, "attention_mask": _as_added(mask, run, hidden_states)}
    ran = run(hidden_states if index is None else _pick(hidden_states, index), **picked)
    update = ran[0] if even else ran[0] * (position >= 0).unsqueeze(-1).to(ran[0].dtype)
    if index is not None:
        flat_index = _flat(index, tokens)
        update = put_back(update.flatten(0, 1), flat_index, hidden_states.shape[0] * tokens)
    return update.view_as(hidden_states), *ran[1:]


def _kept_first(kept: Tensor, width: int) -> Tensor:
    """Return int64 [B, q]: each row's kept tokens in order, then others as fillers."""
    return torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :width]


def _position(kept: Tensor, index: Tensor | None) -> Tensor:
    """Return where in this call the picked tokens stand, int64 [B, q]."""
    if index is not None:
        return index
    return torch.arange(kept.shape[1], device=kept.device).expand_as(kept)


def _serves(given: Tensor | None, width: int, slots: Tensor, length: int) -> bool:
    """Return whether the layer's own mask is right for slots that are all in use.

    It is when every token of the text has its slot. Without one attention is causal: right for one
    query, which comes last, and for tokens that are all new.
    """
    if given is None:
        return width == 1 or width == slots.shape[1]
    return slots.shape[1] == length == given.shape[-1]


def _mask(
    given: Tensor | None, index: Tensor | None, position: Tensor, slots: Tensor, length: int
) -> Tensor:
    """Return the mask [B, 1, q, L] of kept tokens, of the type that the layer was given.

    `given` is the layer's own mask [B or 1, 1, T, K], whose last column is position `length` - 1;
    without one attention is causal.
    """
    # A filler may see the first slot, so that no row of the softmax is empty.
    filler = (position < 0).unsqueeze(2) & (_numbers(slots) == 0)
    if given is None:
        allowed = (slots.unsqueeze(1) <= position.unsqueeze(2)) & (slots >= 0).unsqueeze(1)
        return (allowed | filler).unsqueeze(1)
    if given.dim() != 4:
        raise ValueError(
            f'kv="drop" needs attention that takes a mask of every pair (sdpa or eager); this one '
            f'takes {given.dim()} dimensions. Load the model with attn_implementation="sdpa"'
        )
    rows = given.expand(len(slots), -1, -1, -1)[:, 0]
    if index is not None:
        rows = rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
    column = slots - (length - rows.shape[-1])
    shown = rows.gather(2, column.clamp(min=0).unsqueeze(1).expand(-1, rows.shape[1], -1))
    hidden = ((slots < 0) | (column < 0)).unsqueeze(1)
    shut = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
    shown = shown.masked_fill(hidden, shut)
    return shown.masked_fill(filler, True if given.dtype == torch.bool else 0.0).unsqueeze(1)


def _numbers(slots: Tensor) -> Tensor:
    return torch.arange(slots.shape[1], device=slots.device)


def _as_added(mask: Tensor, run: Run, like: Tensor) -> Tensor:
    """Return a boolean mask as numbers where the attention adds its mask to the scores."""
    config = getattr(getattr(run, "__self__", None), "config", None)
    if mask.dtype != torch.bool or getattr(config, "_attn_implementation", None) != "eager":
        return mask
    lowest = torch.finfo(like.dtype).min
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, lowest)


def _picked(kwargs: Kwargs, index: Tensor, shape: torch.Size) -> dict[str, Any]:
    """Return the attention's arguments for the tokens of `index` [B, q] of [B, T]."""
    return {name: _token_part(value, index, shape) for name, value in kwargs.items()}


def _token_part(value: Any, index: Tensor, shape: torch.Size) -> Any:
    if isinstance(value, tuple):
        return tuple(_token_part(item, index, shape) for item in value)
    per_token = isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == shape[1]
    return _pick(value, index) if per_token else value


def _pick(value: Tensor, index: Tensor) -> Tensor:
    """Return [B, q, ...] of [B or 1, T, ...]."""
    flat_index = index.flatten() if len(value) == 1 else _flat(index, value.shape[1])
    picked = value.flatten(0, 1).index_select(0, flat_index)
    return picked.view(*index.shape, *value.shape[2:])


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Return int64 [B * q]: the positions in [B * T] of `index` [B, q]."""
    first = torch.arange(0, len(index) * tokens, tokens, device=index.device)
    return (index + first.unsqueeze(1)).flatten()
