"""What runs, given a decision: the only place where execution depends on data.

Under ZeRO-3 every decoder layer is one leaf that all ranks enter, so what happens inside may differ
by rank. Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from megaskip.routing.decision import RoutingDecision

Run = Callable[..., Any]
"""The forward of a sublayer's own class."""
Kwargs = dict[str, Any]
"""What a decoder layer passes to its attention by keyword: masks, positions, the cache."""


class Executor(Protocol):
    """Runs a sublayer on what the decision keeps."""

    leaves_zeros: bool
    """Whether every skipped unit's update is zero already, so that none is left to multiply. The
    multiplication carries the routers' gradient, so only inference goes without."""

    reads_decisions: bool
    """Whether the host must know what runs, because only that is run."""

    def attention(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Any:
        """Return attention's output tuple; entry 0 is [B, T, D], zero where nothing was
        computed."""
        ...

    def mlp(
        self, run: Run, hidden_states: Tensor, decision: RoutingDecision, *, is_tuple: bool
    ) -> Any:
        """Return the MLP's output [B, T, D] (or a tuple that starts with it), zero where not
        computed."""
        ...

    def experts(
        self,
        run: Run,
        hidden_states: Tensor,
        index: Tensor,
        weights: Tensor,
        decision: RoutingDecision,
    ) -> Tensor:
        """Return the weighted sums [N, D] of what a layer's experts make of `hidden_states` [N, D];
        arguments as for `run_pairs`."""
        ...

    def block(
        self, run: Run, hidden_states: Tensor, kwargs: Kwargs, decision: RoutingDecision, layer: int
    ) -> Tensor | None:
        """Return the output of a layer whose decision is known before it begins, [B, T, D]; `run`
        is its forward on the rows that run, in which no sublayer selects any. None where all rows
        enter the layer."""
        ...
