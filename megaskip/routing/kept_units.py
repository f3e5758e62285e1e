"""Running a sublayer on the rows or tokens that are kept, and on no others.

Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision, SelectedRows
from megaskip.routing.executor import Kwargs, Run

Select = Callable[[Tensor], Tensor]
"""Returns the rows that are kept of a tensor [B, ...]."""


def run_rows(
    run: Run,
    hidden_states: Tensor,
    kwargs: Kwargs,
    rows: SelectedRows,
    select: Select | None = None,
) -> Any:
    """Run attention on some rows of [B, T, D]; returns its output tuple, zero in the others.

    `select` gives those rows of the arguments in `kwargs`, where somebody has selected them
    already.
    """
    if rows.all:
        return run(hidden_states, **kwargs)
    if rows.none:
        return torch.zeros_like(hidden_states), None
    ran = run(rows.select(hidden_states), **_selected(kwargs, rows, select))
    return put_rows_back(ran, rows)


def run_layer_rows(
    run: Run,
    hidden_states: Tensor,
    kwargs: Kwargs,
    rows: SelectedRows,
    select: Select | None = None,
) -> Tensor:
    """Run a whole layer on some rows of [B, T, D] and return its output, for the others its
    input; `select` as for `run_rows`."""
    output = run(rows.select(hidden_states), **_selected(kwargs, rows, select))
    return hidden_states.index_copy(0, rows.index, output)


def run_units(run: Run, hidden_states: Tensor, decision: RoutingDecision, *, is_tuple: bool) -> Any:
    """Run an MLP on the rows that are kept, or on the tokens, as one row [1, n, D].

    Returns its output [B, T, D] (or a tuple that starts with it), zero in the others.
    """
    by_row = decision.is_per_row
    selected = decision.rows if by_row else decision.tokens
    if selected.all:
        return run(hidden_states)
    if selected.none:
        output = torch.zeros_like(hidden_states)
        return (output, None) if is_tuple else output
    units = hidden_states if by_row else hidden_states.flatten(0, 1)
    picked = units.index_select(0, selected.index)
    ran = run(picked if by_row else picked.unsqueeze(0))
    first, rest = (ran[0], ran[1:]) if is_tuple else (ran, ())
    output = put_back(first.view_as(picked), selected.index, len(units)).view_as(hidden_states)
    return (output, *rest) if is_tuple else output


def put_back(update: Tensor, index: Tensor, total: int) -> Tensor:
    """Return zeros [total, ...] with `update` [n, ...] at the places `index` int64 [n]."""
    return update.new_zeros(total, *update.shape[1:]).index_copy_(0, index, update)


def put_rows_back(ran: Any, rows: SelectedRows) -> Any:
    """Return an attention's output tuple for all rows, zero in those that did not run."""
    # The second is None or the attention's weights, which are rows' too.
    total = len(rows.mask)
    return tuple(
        put_back(item, rows.index, total) if isinstance(item, Tensor) else item for item in ran
    )


def _selected(kwargs: Kwargs, rows: SelectedRows, select: Select | None) -> Kwargs:
    batch, select = len(rows.mask), select or rows.select
    return {name: _rows_of(value, select, batch) for name, value in kwargs.items()}


def _rows_of(value: Any, select: Select, batch: int) -> Any:
    """Return an argument's kept rows; tensors that broadcast over the batch stay whole."""
    if isinstance(value, Tensor):
        # One-dimensional ones run over tokens, however many rows there are.
        return select(value) if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, tuple):
        return tuple(_rows_of(item, select, batch) for item in value)
    return value
