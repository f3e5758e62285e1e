"""Inference that computes and stores what is kept: rows of a batch, or tokens of a row.

Shapes: B rows, T tokens of this call, D hidden.
"""

import warnings
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from megaskip.inference.kept import (
    KeptRows,
    KeptTokens,
    can_store_rows,
    can_store_some,
    is_offloaded,
    store_rows_in,
    store_tokens_in,
)
from megaskip.inference.packed import attend_among_kept
from megaskip.inference.shared_rows import shared_select
from megaskip.routing.decision import RoutingDecision, SelectedRows
from megaskip.routing.executor import Kwargs, Run
from megaskip.routing.experts import run_pairs
from megaskip.routing.kept_units import Select, run_layer_rows, run_rows, run_units


class InferenceExecutor:
    """Leaves out what is skipped, in prefill and decode, and its keys and values where sound.

    A sequence that skips a layer holds nothing there. For token units `kv="keep"` is the published
    semantics, in which skipped tokens are still attended to (their keys and values are computed);
    `kv="drop"` makes them invisible, as in mixture-of-depths, and saves their computation and
    memory.
    """

    leaves_zeros = True
    reads_decisions = True

    def __init__(self, *, unit: str, kv: str = "keep") -> None:
        self._unit = unit
        self._drop = kv == "drop"

    @property
    def drops_tokens(self) -> bool:
        """Return whether tokens that skip an attention hold no keys and values in it."""
        return self._drop

    def attention(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Any:
        """Run attention on what is kept; keys and values go to the cache in `kwargs`, if any."""
        cache = kwargs.get("past_key_values")
        if self._unit == "token" and self._drop:
            return self._among_kept(run, hidden_states, kwargs, decision, layer)
        if cache is None:
            ran = run_rows(run, hidden_states, kwargs, decision.rows)
            return ran if decision.is_per_row else _multiplied(ran, decision)
        if self._unit == "token":
            return _multiplied(run(hidden_states, **kwargs), decision)
        cache_layer = _layer_of(cache, layer)
        if not isinstance(cache_layer, KeptRows):
            if decision.unit_of_token is not None or not can_store_rows(cache, cache_layer):
                _warn_dense(cache, cache_layer)
                return _multiplied(run(hidden_states, **kwargs), decision)
            cache_layer = store_rows_in(cache, layer)
        if cache_layer._skip_rows is None:
            cache_layer._skip_rows = decision.rows
        rows: SelectedRows = cache_layer._skip_rows
        select = _select(cache, layer, rows, hidden_states)
        ran = run_rows(run, hidden_states, kwargs, rows, select)
        cache_layer.advance(hidden_states.shape[1], ran=not rows.none)
        return ran

    def mlp(
        self, run: Run, hidden_states: Tensor, decision: RoutingDecision, *, is_tuple: bool
    ) -> Any:
        """Run the MLP on the rows, or the tokens, that are kept."""
        return run_units(run, hidden_states, decision, is_tuple=is_tuple)

    def experts(
        self,
        run: Run,
        hidden_states: Tensor,
        index: Tensor,
        weights: Tensor,
        decision: RoutingDecision,
    ) -> Tensor:
        """Run the experts on the tokens at them that are kept."""
        return run_pairs(run, hidden_states, index, weights, decision)

    def block(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Tensor | None:
        """Run a layer on the rows that its cache holds; the others are not touched."""
        cache = kwargs.get("past_key_values")
        cache_layer = _layer_of(cache, layer) if cache is not None else None
        if not isinstance(cache_layer, KeptRows):
            return None
        rows = cache_layer._skip_rows
        if rows is None or rows.all:
            return None
        output = hidden_states
        if rows.mixed:
            select = _select(cache, layer, rows, hidden_states)
            output = run_layer_rows(run, hidden_states, kwargs, rows, select)
        cache_layer.advance(hidden_states.shape[1], ran=rows.mixed)
        return output

    def _among_kept(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Any:
        """Run attention among kept tokens, which are all that the cache holds."""
        cache = kwargs.get("past_key_values")
        cache_layer = _layer_of(cache, layer) if cache is not None else None
        if cache_layer is not None and not isinstance(cache_layer, KeptTokens):
            if not can_store_some(cache, cache_layer):
                raise NotImplementedError(
                    'megaskip: this model was exported with kv="drop", in which later tokens do '
                    f"not see what is skipped, and {_described(cache, cache_layer)} cannot hold a "
                    "part of the keys and values; use a DynamicCache"
                )
            cache_layer = store_tokens_in(
                cache, layer, hidden_states.shape[0], hidden_states.device
            )
        kept = (decision.keep > 0) & decision.unit_mask
        return attend_among_kept(run, hidden_states, kwargs, kept, cache_layer)


def _select(cache: Any, layer: int, rows: SelectedRows, hidden_states: Tensor) -> Select | None:
    """Return what gives rows of arguments that a decode step's layers share; None elsewhere.

    All layers' rows of a mask [B, 1, T, L] would take much memory with more tokens than one.
    """
    is_step = hidden_states.shape[1] == 1 and rows.mixed
    return shared_select(cache, layer, rows) if is_step else None


def _multiplied(ran: Any, decision: RoutingDecision) -> Any:
    """Return attention's output tuple with zeros for the units that are skipped."""
    keep = decision.per_token().unsqueeze(-1).to(ran[0].dtype)
    return ran[0] * keep, *ran[1:]


def _layer_of(cache: Any, layer: int) -> Any:
    """Return the cache layer, made now if the cache makes its layers as they come."""
    if not isinstance(cache, Cache):
        raise TypeError(
            f"megaskip: past_key_values is a {type(cache).__name__}, expected a cache of "
            "transformers with one layer for each of the model's; pass a DynamicCache"
        )
    make_layer: Any = cache.layer_class_to_replicate
    while len(cache.layers) <= layer:
        cache.layers.append(make_layer())
    return cache.layers[layer]


def _described(cache: Any, layer: Any) -> str:
    return "an offloaded cache" if is_offloaded(cache) else type(layer).__name__


def _warn_dense(cache: Any, layer: Any) -> None:
    warnings.warn(
        f"megaskip: {_described(cache, layer)} cannot hold a part of the keys and values, "
        "so routed layers are computed in full and multiplied; use a DynamicCache to save what is "
        "skipped",
        stacklevel=2,
    )
