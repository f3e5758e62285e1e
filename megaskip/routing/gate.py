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
        self.observe: Callable[[Tensor, Tensor], object] | None = None
        """Told what a sublayer reads and the update it returns, [B, T, D] each, at each pass of
        training executors; for a compensation to be fitted."""
        self._router, self._thresholds, self._state, self._unit = router, thresholds, state, unit
        self._compensation_input: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decision": None, "observe": None, "_compensation_input": None}

    def decide(self, hidden_states: Tensor) -> None:
        """Decide from the layer's normalised input [B, T, D], for the update sites that follow in
        it."""
        cached = self._state.cached.get(self.layer)
        self.decision = cached or self._decide(hidden_states)
        self._state.record(self.layer, self.decision)
        if "mlp" not in self.writes:
            self._note_input(hidden_states)

    def run_attention(
        self, run: Callable[..., Any], hidden_states: Tensor, kwargs: dict[str, Any]
    ) -> Any:
        """Run the attention on what is kept; returns its output tuple, not yet multiplied."""
        executor = self._state.executor
        return executor.attention(run, hidden_states, kwargs, self._decided(), self.layer)

    def run_mlp(self, run: Callable[..., Any], hidden_states: Tensor, *, is_tuple: bool) -> Any:
        """Run the MLP on what is kept; returns its output, not yet multiplied."""
        if "mlp" in self.writes:
            self._note_input(hidden_states)
        return self._state.executor.mlp(run, hidden_states, self._decided(), is_tuple=is_tuple)

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Return the update [B, T, D] of what is kept and the compensation of what is skipped, in
        the update's dtype."""
        read = self._take_input()
        if self._state.executor.leaves_zeros:
            return self._compensated(update, read)
        if read is not None and self.observe is not None:
            self.observe(read, update)
        keep = self._multiplier(update)
        kept = update * keep
        return kept if read is None else kept + self._compensation(read) * (1 - keep)

    def passes_by(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
        """Return whether a cached decision lets no row run the layer; then the cache has noted the
        tokens."""
        executor, cached = self._state.executor, self._state.cached.get(self.layer)
        if self._router.compensation is not None:  # it reads what only the layer's norm returns
            return False
        if cached is None or not executor.passes_by(hidden_states, kwargs, cached, self.layer):
            return False
        self._state.record(self.layer, cached)
        return True

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return x + keep * (output - x) + (1 - keep) * compensation, written so that it is exact
        at keep 0 and 1; all [B, T, D]."""
        read = self._take_input()
        if self._state.executor.leaves_zeros:  # x + 0 + 0 where it is skipped
            return self._compensated(output, read)
        keep = self._multiplier(output)
        if read is None:
            return output * keep + hidden_states * (1 - keep)
        if self.observe is not None:
            self.observe(read, output - hidden_states)
        return output * keep + (hidden_states + self._compensation(read)) * (1 - keep)

    # -- compensation

    def _note_input(self, hidden_states: Tensor) -> None:
        """Keep what the compensation will read, until the update is there."""
        if self._router.compensation is not None:
            self._compensation_input = hidden_states

    def _take_input(self) -> Tensor | None:
        """Return what the compensation reads, and forget it; None without a compensation."""
        read, self._compensation_input = self._compensation_input, None
        return read

    def _compensation(self, read: Tensor) -> Tensor:
        assert self._router.compensation is not None
        return self._router.compensation(read)  # type: ignore[no-any-return]

    def _compensated(self, update: Tensor, read: Tensor | None) -> Tensor:
        """Return the update [B, T, D] with the compensation added where units are skipped: units
        that run pay nothing for it."""
        if read is None:
            return update
        decision = self._decided()
        by_row = decision.is_per_row
        skipped = decision.skipped_rows if by_row else decision.skipped_tokens
        if skipped.none:
            return update
        if skipped.all:
            return update + self._compensation(read)
        rows = read if by_row else read.flatten(0, 1)
        added = self._compensation(rows.index_select(0, skipped.index))
        whole = update if by_row else update.flatten(0, 1)
        return whole.index_add(0, skipped.index, added).view_as(update)

    # -- decisions

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
