"""Executors of training: run everything, or leave out what is skipped; the gate multiplies.

Under ZeRO-3 every decoder layer is one leaf that all ranks enter, so what happens inside may differ
by rank. Shapes: B rows, T tokens, D hidden.
"""

from typing import Any

from torch import Tensor

from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Kwargs, Run
from megaskip.routing.experts import run_pairs
from megaskip.routing.kept_units import run_rows, run_units


class DenseExecutor:
    """Run every unit; the gate multiplies the update. The published training objective."""

    leaves_zeros = False
    reads_decisions = False

    def attention(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Any:
        """Run attention on all rows."""
        return run(hidden_states, **kwargs)

    def mlp(
        self, run: Run, hidden_states: Tensor, decision: RoutingDecision, *, is_tuple: bool
    ) -> Any:
        """Run the MLP on all tokens."""
        return run(hidden_states)

    def experts(
        self,
        run: Run,
        hidden_states: Tensor,
        index: Tensor,
        weights: Tensor,
        decision: RoutingDecision,
    ) -> Tensor:
        """Run the experts on all tokens that are given to them."""
        return run(hidden_states, index, weights)  # type: ignore[no-any-return]

    def block(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Tensor | None:
        """Return None: everything runs."""
        return None


class SparseExecutor:
    """Run what is kept: attention by row, MLPs by token, experts by token and expert.

    A row's attention is left out when none of its units is kept. A row that keeps some tokens runs
    whole: skipped tokens' keys and values are still attended to (published semantics), which needs
    their projections.
    """

    leaves_zeros = False
    reads_decisions = True

    def __init__(self, *, rows_are_shared: bool = False) -> None:
        """`rows_are_shared` says that other processes hold more tokens of the same rows."""
        self._rows_are_shared = rows_are_shared

    def attention(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Any:
        """Run attention on the rows that keep something."""
        if self._rows_are_shared and not decision.is_per_row:
            # Others may keep tokens of a row that keeps none here, and all take part in it.
            return run(hidden_states, **kwargs)
        return run_rows(run, hidden_states, kwargs, decision.rows)

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
        """Return None: the layer is entered, for its router to read."""
        return None
