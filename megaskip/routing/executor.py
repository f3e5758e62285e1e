"""What runs, given a decision: the only place where execution depends on data.

Under ZeRO-3 every decoder layer is one leaf that all ranks enter, so what happens inside may differ
by rank. Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision, SelectedRows


class Executor(Protocol):
    """Runs a sublayer on what the decision keeps."""

    leaves_zeros: bool
    """Whether every skipped unit's update is zero already, so that none is left to multiply. The
    multiplication carries the routers' gradient, so only inference goes without."""

    def attention(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Return attention's output tuple; entry 0 is [B, T, D], zero where nothing was
        computed."""
        ...

    def mlp(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        decision: RoutingDecision,
        *,
        is_tuple: bool,
    ) -> Any:
        """Return the MLP's output [B, T, D] (or a tuple that starts with it), zero where not
        computed."""
        ...

    def passes_by(
        self, hidden_states: Tensor, kwargs: dict[str, Any], decision: RoutingDecision, layer: int
    ) -> bool:
        """Return whether a whole layer can be left out, given its arguments; takes note of it."""
        ...


class DenseExecutor:
    """Run every unit; the gate multiplies the update. The published training objective."""

    leaves_zeros = False

    def attention(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Run attention on all rows."""
        return run(hidden_states, **kwargs)

    def mlp(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        decision: RoutingDecision,
        *,
        is_tuple: bool,
    ) -> Any:
        """Run the MLP on all tokens."""
        return run(hidden_states)

    def passes_by(
        self, hidden_states: Tensor, kwargs: dict[str, Any], decision: RoutingDecision, layer: int
    ) -> bool:
        """Return False: everything runs."""
        return False


class SparseExecutor:
    """Run what is kept: attention by row, MLPs by token.

    A row's attention is left out when none of its units is kept. A row that keeps some tokens runs
    whole: skipped tokens' keys and values are still attended to (published semantics), which needs
    their projections.
    """

    leaves_zeros = False

    def attention(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Run attention on the rows that keep something."""
        return run_rows(run, hidden_states, kwargs, decision.rows)

    def mlp(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        decision: RoutingDecision,
        *,
        is_tuple: bool,
    ) -> Any:
        """Run the MLP on the rows that are kept, or on the tokens, as one row [1, n, D]."""
        by_row = decision.is_per_row
        chosen = decision.rows if by_row else decision.tokens
        if chosen.all:
            return run(hidden_states)
        if chosen.none:
            output = torch.zeros_like(hidden_states)
            return (output, None) if is_tuple else output
        units = hidden_states if by_row else hidden_states.flatten(0, 1)
        picked = units.index_select(0, chosen.index)
        ran = run(picked if by_row else picked.unsqueeze(0))
        first, rest = (ran[0], ran[1:]) if is_tuple else (ran, ())
        output = put_back(first.view_as(picked), chosen.index, len(units)).view_as(hidden_states)
        return (output, *rest) if is_tuple else output

    def passes_by(
        self, hidden_states: Tensor, kwargs: dict[str, Any], decision: RoutingDecision, layer: int
    ) -> bool:
        """Return False: the layer is entered, for its router to read."""
        return False


def run_rows(
    run: Callable[..., Any], hidden_states: Tensor, kwargs: dict[str, Any], rows: SelectedRows
) -> Any:
    """Run attention on some rows of [B, T, D]; returns its output tuple, zero in the others."""
    if rows.all:
        return run(hidden_states, **kwargs)
    if rows.none:
        return torch.zeros_like(hidden_states), None
    picked = {name: rows_of(value, rows.index, rows.total) for name, value in kwargs.items()}
    ran = run(hidden_states.index_select(0, rows.index), **picked)
    # The second is None or the attention's weights, which are rows' too.
    return tuple(
        put_back(one, rows.index, rows.total) if isinstance(one, Tensor) else one for one in ran
    )


def put_back(update: Tensor, index: Tensor, total: int) -> Tensor:
    """Return zeros [total, ...] with `update` [n, ...] at the places `index` int64 [n]."""
    return update.new_zeros(total, *update.shape[1:]).index_copy_(0, index, update)


def rows_of(value: Any, index: Tensor, batch: int) -> Any:
    """Return `value` for the rows of `index`; tensors that broadcast over the batch stay whole."""
    if isinstance(value, Tensor):
        # One-dimensional ones run over tokens, however many rows there are.
        per_row = value.dim() > 1 and value.shape[0] == batch
        return value.index_select(0, index) if per_row else value
    if isinstance(value, tuple):
        return tuple(rows_of(item, index, batch) for item in value)
    return value
