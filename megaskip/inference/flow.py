"""Inference that computes and stores what is kept: rows of a batch, or tokens of a row.

Shapes: B rows, T tokens of this call, q kept tokens, L slots of the cache, D hidden.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaskip.inference.kept import (
    KeptRows,
    KeptTokens,
    can_hold_a_part,
    holding_rows,
    holding_tokens,
)
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.flow import SparseFlow, rows_of

KV_CHOICES = ("keep", "drop")


class InferenceFlow(SparseFlow):
    """Leaves out what is skipped, in prefill and decode, and its keys and values where sound.

    A sequence that skips a layer holds nothing there. For token units `kv="keep"` is the published
    semantics, in which skipped tokens are still attended to (their keys and values are computed);
    `kv="drop"` makes them invisible, as in mixture-of-depths, and saves their computation and
    memory.
    """

    def __init__(self, *, unit: str, kv: str = "keep") -> None:
        self._unit = unit
        self._drop = kv == "drop"

    @property
    def drops_tokens(self) -> bool:
        """Return whether tokens that skip an attention hold no keys and values in it."""
        return self._drop

    def attention(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Run attention on what is kept; keys and values go to the cache in `kwargs`, if any."""
        cache = kwargs.get("past_key_values")
        if self._unit == "token":
            if self._drop:
                return self._kept_tokens(run, hidden_states, kwargs, decision, layer)
            if cache is not None:
                return run(hidden_states, **kwargs)
        if cache is None:
            return super().attention(run, hidden_states, kwargs, decision, layer)
        held = _layer_of(cache, layer)
        if not isinstance(held, KeptRows):
            if decision.unit_of_token is not None or not can_hold_a_part(held):
                _say_dense(held)
                return run(hidden_states, **kwargs)
            held = holding_rows(cache, layer)
        if held._skip_rows is None:
            held.decide(decision.keep[:, 0] > 0)
        return _run_rows(run, hidden_states, kwargs, held)

    def _kept_tokens(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Run attention among kept tokens: packed to the left, [B, q, D], with their own mask."""
        cache = kwargs.get("past_key_values")
        held = _layer_of(cache, layer) if cache is not None else None
        if held is not None and not isinstance(held, KeptTokens):
            if not can_hold_a_part(held):
                _say_dense(held)
                return run(hidden_states, **kwargs)
            held = holding_tokens(cache, layer, hidden_states.shape[0], hidden_states.device)
        kept = (decision.keep > 0) & decision.unit_mask
        seen = held._skip_seen if held is not None else 0
        if held is not None:
            held.advance(hidden_states.shape[1])
        output = torch.zeros_like(hidden_states)
        width = int(kept.sum(1).max())
        if not width:
            return output, None
        index = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)[:, :width]
        real = kept.gather(1, index)
        position = torch.where(real, index + seen, -1)
        slots = position
        if held is not None:
            held._skip_incoming = position
            slots = _slots_after(held._skip_position, position)
        picked = _tokens_of(kwargs, index, hidden_states.shape[:2])
        length = seen + hidden_states.shape[1]
        mask = _mask(kwargs.get("attention_mask"), index, position, slots, length)
        if mask.dtype == torch.bool and _adds_masks(run):
            lowest = torch.finfo(hidden_states.dtype).min
            mask = torch.zeros_like(mask, dtype=hidden_states.dtype).masked_fill(~mask, lowest)
        picked["attention_mask"] = mask
        ran = run(_pick(hidden_states, index), **picked)
        update = ran[0] * real.unsqueeze(-1).to(output.dtype)
        return output.scatter_add(1, index.unsqueeze(-1).expand_as(update), update), *ran[1:]


def _run_rows(
    run: Callable[..., Any], hidden_states: Tensor, kwargs: dict[str, Any], held: KeptRows
) -> Any:
    """Run the kept rows; the cache layer gets their keys and values alone."""
    batch, tokens = hidden_states.shape[:2]
    count = len(held._skip_index)
    if count == batch:
        ran = run(hidden_states, **kwargs)
    elif count:
        index = held._skip_index
        picked = {name: rows_of(value, index, batch) for name, value in kwargs.items()}
        ran = run(hidden_states[index], **picked)
        output = torch.zeros_like(hidden_states).index_copy(0, index, ran[0])
        ran = (output, *ran[1:])
    else:
        ran = (torch.zeros_like(hidden_states), None)
    held.advance(tokens, ran=count > 0)
    return ran


def _layer_of(cache: Any, layer: int) -> Any:
    """Return the cache layer, made now if the cache makes its layers as they come."""
    while len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer]


def _slots_after(held: Tensor, incoming: Tensor) -> Tensor:
    """Return the positions that KeptTokens.update will hold, int64 [B, L]."""
    both = torch.cat([held, incoming], dim=1)
    order = torch.argsort((both < 0).to(torch.uint8), dim=1, stable=True)
    return both.gather(1, order)[:, : int((both >= 0).sum(1).max())]


def _mask(
    given: Tensor | None, index: Tensor, position: Tensor, slots: Tensor, length: int
) -> Tensor:
    """Return the mask [B, 1, q, L] of kept tokens, of the type that the layer was given.

    `given` is the layer's own mask [B or 1, 1, T, K], whose last column is position `length` - 1;
    without one attention is causal.
    """
    # A filler may see the first slot, so that no row of the softmax is empty.
    seen_by_filler = torch.zeros_like(slots, dtype=torch.bool)
    seen_by_filler[:, :1] = True
    if given is None:
        allowed = (slots.unsqueeze(1) <= position.unsqueeze(2)) & (slots >= 0).unsqueeze(1)
        allowed |= (position < 0).unsqueeze(2) & seen_by_filler.unsqueeze(1)
        return allowed.unsqueeze(1)
    if given.dim() != 4:
        raise ValueError(
            f'kv="drop" needs attention that takes a mask of every pair (sdpa or eager); this one '
            f'takes {given.dim()} dimensions. Load the model with attn_implementation="sdpa"'
        )
    whole = given.expand(index.shape[0], -1, -1, -1)[:, 0]
    column = slots - (length - whole.shape[-1])
    rows = whole.gather(1, index.unsqueeze(-1).expand(-1, -1, whole.shape[-1]))
    found = rows.gather(2, column.clamp(min=0).unsqueeze(1).expand(-1, rows.shape[1], -1))
    hidden = ((slots < 0) | (column < 0)).unsqueeze(1)
    shut = False if given.dtype == torch.bool else torch.finfo(given.dtype).min
    found = found.masked_fill(hidden, shut)
    filler = (position < 0).unsqueeze(2) & seen_by_filler.unsqueeze(1)
    return found.masked_fill(filler, True if given.dtype == torch.bool else 0.0).unsqueeze(1)


def _adds_masks(run: Callable[..., Any]) -> bool:
    """Return whether the attention adds its mask to the scores instead of selecting by it."""
    config = getattr(getattr(run, "__self__", None), "config", None)
    return getattr(config, "_attn_implementation", None) == "eager"


def _tokens_of(kwargs: dict[str, Any], index: Tensor, shape: torch.Size) -> dict[str, Any]:
    """Return the attention's arguments for the tokens of `index` [B, q]."""
    return {name: _token_part(value, index, shape) for name, value in kwargs.items()}


def _token_part(value: Any, index: Tensor, shape: torch.Size) -> Any:
    if isinstance(value, tuple):
        return tuple(_token_part(item, index, shape) for item in value)
    per_token = isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == shape[1]
    return _pick(value, index) if per_token else value


def _pick(value: Tensor, index: Tensor) -> Tensor:
    """Return [B, q, ...] of [B or 1, T, ...]."""
    value = value.expand(index.shape[0], *value.shape[1:])
    spread = index.reshape(*index.shape, *[1] * (value.dim() - 2))
    return value.gather(1, spread.expand(*index.shape, *value.shape[2:]))


def _say_dense(layer: Any) -> None:
    warnings.warn(
        f"megaskip: {type(layer).__name__} cannot hold a part of the keys and values, so routed "
        "layers are computed in full and multiplied; use a DynamicCache to save what is skipped",
        stacklevel=2,
    )
