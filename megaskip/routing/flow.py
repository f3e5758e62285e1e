"""What runs, given a decision: the only place where execution depends on data.

Under ZeRO-3 every decoder layer is one leaf that all ranks enter, so what happens inside may differ
by rank. Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision


class Flow(Protocol):
    """Runs a sublayer on what the decision keeps."""

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


class DenseFlow:
    """Run every unit; the gate multiplies the update. The published training objective."""

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


class SparseFlow:
    """Run what is kept: attention by row, MLPs by token.

    A row's attention is left out when none of its units is kept. A row that keeps some tokens runs
    whole: skipped tokens' keys and values are still attended to (published semantics), which needs
    their projections.
    """

    def attention(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        kwargs: dict[str, Any],
        decision: RoutingDecision,
        layer: int,
    ) -> Any:
        """Run attention on the rows that keep something."""
        rows = (decision.keep.detach() > 0).any(dim=1)
        if bool(rows.all()):
            return run(hidden_states, **kwargs)
        output = torch.zeros_like(hidden_states)
        if not bool(rows.any()):
            return output, None
        index = rows.nonzero().squeeze(1)
        batch = hidden_states.shape[0]
        picked = {name: rows_of(value, index, batch) for name, value in kwargs.items()}
        ran = run(hidden_states[index], **picked)
        return output.index_copy(0, index, ran[0]), *ran[1:]

    def mlp(
        self,
        run: Callable[..., Any],
        hidden_states: Tensor,
        decision: RoutingDecision,
        *,
        is_tuple: bool,
    ) -> Any:
        """Run the MLP on the tokens that are kept, as one row [1, n, D]."""
        kept = (decision.per_token().detach() > 0).expand(hidden_states.shape[:2])
        if bool(kept.all()):
            return run(hidden_states)
        output = torch.zeros_like(hidden_states)
        if not bool(kept.any()):
            return (output, None) if is_tuple else output
        ran = run(hidden_states[kept].unsqueeze(0))
        first, rest = (ran[0], ran[1:]) if is_tuple else (ran, ())
        output = output.masked_scatter(kept.unsqueeze(-1), first.squeeze(0))
        return (output, *rest) if is_tuple else output


def rows_of(value: Any, index: Tensor, batch: int) -> Any:
    """Return `value` for the rows of `index`; tensors that broadcast over the batch stay whole."""
    if isinstance(value, Tensor):
        # One-dimensional ones run over tokens, however many rows there are.
        return value[index] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, tuple):
        return tuple(rows_of(item, index, batch) for item in value)
    return value
