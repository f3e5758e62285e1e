"""The gate of one decoder layer: decides once, then lets through what was decided. Knows no model.

Shapes: B rows, T tokens, D hidden, U units of decision in a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision, send_together
from megaskip.routing.executor import Kwargs, Run
from megaskip.routing.kept_units import put_rows_back
from megaskip.routing.pooling import Pooling
from megaskip.routing.precision import without_autocast
from megaskip.routing.router import Router
from megaskip.routing.state import RoutingState
from megaskip.routing.thresholds import Thresholds


class Gate:
    """Decides for one layer, with its router; for executors that leave zeros where they skip.

    A plain object, so that no state-dict key of the model changes.
    """

    def __init__(
        self, layer: int, target: str, router: Router, thresholds: Thresholds, state: RoutingState
    ) -> None:
        self.layer = layer
        self.decision: RoutingDecision | None = None
        self.skips = frozenset({"attn", "mlp"} if target == "block" else {target})
        self.writes = frozenset({target})
        self._router, self._thresholds, self._state = router, thresholds, state
        self._compensation_input: Tensor | None = None
        self.followers: Sequence[Gate] = ()
        """Of the layers above, for which this one's input is read, too."""
        self.follows = False
        """Whether another gate decides for this one."""
        self._rows_are_selected = False
        """Whether the layer has been given the rows that run, and no others."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decision": None, "_compensation_input": None}

    def decide(self, hidden_states: Tensor) -> None:
        """Decide from the layer's normalised input [B, T, D], for the update sites that follow in
        it."""
        known = self._state.cached.get(self.layer) or self._state.ahead.get(self.layer)
        if known:
            decision = known.on(hidden_states.device)
        else:
            with without_autocast(hidden_states.device):
                decision = self._decide(hidden_states)
        self._settle(decision)
        if "attn" not in self.skips and self._state.executor.reads_decisions:
            decision.send_to_host()  # while the attention runs
        if "mlp" not in self.writes:
            self._note_input(hidden_states)

    def run_attention(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Any:
        """Run the attention on what is kept; returns its output tuple, not yet multiplied."""
        if self._rows_are_selected:
            update, *rest = run(hidden_states, **kwargs)
            return update, *put_rows_back(rest, self._decided().rows)
        executor = self._state.executor
        return executor.attention(run, hidden_states, kwargs, self._decided(), self.layer)

    def run_mlp(self, run: Run, hidden_states: Tensor, *, is_tuple: bool) -> Any:
        """Run the MLP on what is kept; returns its output, not yet multiplied."""
        if "mlp" in self.writes:
            self._note_input(hidden_states)
        if self._rows_are_selected:
            return run(hidden_states)
        return self._state.executor.mlp(run, hidden_states, self._decided(), is_tuple=is_tuple)

    def run_experts(
        self, run: Run, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Decide about each token at each of its experts, and run those that are kept; arguments
        and result as of `run_pairs`."""
        with without_autocast(hidden_states.device):
            decision = self._decide_pairs(hidden_states, index)
        self._settle(decision)
        weights = self._weighted(weights)
        return self._state.executor.experts(run, hidden_states, index, weights, decision)

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Return the update [B, T, D], which is zero where units are skipped, with the compensation
        there."""
        return self._compensated(update, self._take_input())

    def run_block(self, run: Run, hidden_states: Tensor, kwargs: Kwargs) -> Tensor | None:
        """Run the layer on the rows that a cached decision keeps, and return its output [B, T, D];
        None where all rows enter it."""
        cached = self._state.cached.get(self.layer)
        # A compensation reads what the layer's norm returns, of the rows that skip.
        if cached is None or self._router.compensation is not None:
            return None
        self._rows_are_selected = True
        try:
            executor = self._state.executor
            output = executor.block(run, hidden_states, kwargs, cached, self.layer)
        finally:
            self._rows_are_selected = False
        if output is not None:
            self._state.record(self.layer, cached)
        return output

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return the layer's output [B, T, D], its input x + 0 + 0 where units are skipped, with
        the compensation there."""
        return self._compensated(output, self._take_input())

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
        with without_autocast(read.device):
            return self._router.compensation(read)  # type: ignore[no-any-return]

    def _compensated(self, update: Tensor, read: Tensor | None) -> Tensor:
        """Return the update [B, T, D] with the compensation added where units are skipped: units
        that run pay nothing for it."""
        if read is None:
            return update
        decision = self._decided()
        by_row = decision.is_per_row
        skipped = (decision.rows if by_row else decision.tokens).others
        if skipped.none:
            return update
        if skipped.all:
            return update + self._compensation(read).to(update.dtype)
        rows = read if by_row else read.flatten(0, 1)
        added = self._compensation(rows.index_select(0, skipped.index))
        whole = update if by_row else update.flatten(0, 1)
        # Under autocast a sublayer's update has another type than what it reads.
        return whole.index_add(0, skipped.index, added.to(whole.dtype)).view_as(update)

    # -- decisions

    def _decide(self, hidden_states: Tensor) -> RoutingDecision:
        assert not self.follows, "the first routed layer decides for this one, and did not run"
        pooling, device = self._state.pooling_for(hidden_states), hidden_states.device
        features = pooling.features(hidden_states)
        if not self.followers:
            return self._decision(pooling, features, device)
        # What is read is not moved by the layers that it is read for.
        features = features.detach()
        own, *others = [g._decision(pooling, features, device) for g in (self, *self.followers)]
        # Where the backward pass computes this again, the host knows already.
        if self._state.executor.reads_decisions and self.layer not in self._state.decisions:
            send_together([own, *others])
        self._state.ahead = {g.layer: d for g, d in zip(self.followers, others, strict=True)}
        return own

    def _settle(self, decision: RoutingDecision) -> None:
        """Take a decision for that of this pass."""
        earlier = self._state.decisions.get(self.layer)
        if earlier is not None:  # of the pass that the backward pass computes again
            decision.take_over(earlier)
        self.decision = decision
        self._state.record(self.layer, decision)

    def _decide_pairs(self, hidden_states: Tensor, index: Tensor) -> RoutingDecision:
        """Return the decision about tokens [N, D] at their experts, `index` int64 [N, K]."""
        pooling = self._state.pooling_for_flat(hidden_states)
        units, expert = pooling.unit_mask, index.reshape(pooling.unit_mask.shape)
        scores = self._router(hidden_states.float()).to(hidden_states.device)
        logit = scores.gather(1, index).view(expert.shape)
        keep = self._thresholds.keep(logit, self.layer)
        return RoutingDecision(
            logit=logit,
            keep=self._state.overridden(self.layer, keep),
            unit_mask=units.to(keep.device),
            unit_of_token=None,
            choices=pooling.choices,
            expert=expert,
        )

    def _weighted(self, weights: Tensor) -> Tensor:
        """Return how much each expert of a token counts [N, K], once that carries the decision
        where executors do not."""
        return weights

    def _decision(
        self, pooling: Pooling, features: Tensor, device: torch.device
    ) -> RoutingDecision:
        """Return what this layer's router decides about `features` float32 [B, U, D]."""
        # Under a device_map the routers may be on another device than the layer.
        logit = self._router(features).to(device)
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
