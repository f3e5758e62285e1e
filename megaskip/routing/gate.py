"""The gate of one decoder layer: decides once, then lets through what was decided. Knows no model.

Shapes: B rows, T tokens, D hidden, U units of decision in a row.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megaskip.routing.decision import RoutingDecision
from megaskip.routing.router import Router
from megaskip.routing.state import RoutingState
from megaskip.routing.thresholds import Thresholds


class Gate:
    """Decides for one layer, with its router. A plain object, so that no state-dict key of the
    model changes."""

    def __init__(
        self,
        layer: int,
        router: Router,
        thresholds: Thresholds,
        state: RoutingState,
        *,
        target: str,
        unit: str,
    ) -> None:
        self.layer = layer
        self.decision: RoutingDecision | None = None
        self.skips = frozenset({"attn", "mlp"} if target == "block" else {target})
        self.writes = frozenset({target})
        self._router, self._thresholds, self._state, self._unit = router, thresholds, state, unit

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decision": None}

    def decide(self, hidden_states: Tensor) -> None:
        """Decide from the layer's normalised input [B, T, D], for the update sites that follow in
        it."""
        cached = self._state.cached.get(self.layer)
        self.decision = cached or self._decide(hidden_states)
        self._state.record(self.layer, self.decision)

    def run_attention(
        self, run: Callable[..., Any], hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Run the attention on what is kept; returns its output tuple, not yet multiplied."""
        executor = self._state.executor
        return executor.attention(run, hidden_states, kwargs, self._decided(), self.layer)

    def run_mlp(self, run: Callable[..., Any], hidden_states: Tensor, *, is_tuple: bool) -> Any:
        """Run the MLP on what is kept; returns its output, not yet multiplied."""
        return self._state.executor.mlp(run, hidden_states, self._decided(), is_tuple=is_tuple)

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Multiply the update [B, T, D] by the decision, in the update's dtype, unless the executor
        did."""
        if self._state.executor.leaves_zeros:
            return update
        return update * self._multiplier(update)

    def passes_by(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
        """Return whether a cached decision lets no row run the layer; then the cache has noted the
        tokens."""
        executor, cached = self._state.executor, self._state.cached.get(self.layer)
        if cached is None or not executor.passes_by(hidden_states, kwargs, cached, self.layer):
            return False
        self._state.record(self.layer, cached)
        return True

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return x + keep * (output - x), written so that it is exact at keep 0 and 1; all [B, T,
        D]."""
        if self._state.executor.leaves_zeros:  # x + 0 + 0 where it is skipped
            return output
        keep = self._multiplier(output)
        return output * keep + hidden_states * (1 - keep)

    def _multiplier(self, like: Tensor) -> Tensor:
        return self._decided().per_token().unsqueeze(-1).to(like.dtype)

    def _decide(self, hidden_states: Tensor) -> RoutingDecision:
        pooling = self._state.pooling_for(hidden_states, self._unit)
        # Under a device_map the routers may be on another device than the layer.
        logit = self._router(pooling.features(hidden_states)).to(hidden_states.device)
        keep = self._thresholds.keep(logit, self.layer)
        segments = pooling.unit_of_token
        return RoutingDecision(
            logit=logit,
            keep=self._state.overridden(self.layer, keep),
            unit_mask=pooling.unit_mask.to(keep.device),
            unit_of_token=None if segments is None else segments.to(keep.device),
        )

    def _decided(self) -> RoutingDecision:
        assert self.decision is not None, "a sublayer ran before its layer's gate decided"
        return self.decision
