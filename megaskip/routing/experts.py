"""The experts of a mixture, and running them on the tokens that are kept. Torch only.

A pair is a token at one of its experts. Shapes: N tokens of a batch (B rows of T), K experts of a
token, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Run
from megaskip.routing.kept_units import put_back


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """How many experts each routed layer of a mixture has."""

    count: int
    per_token: int
    """Those that a token is given to."""


def run_pairs(
    run: Run, hidden_states: Tensor, index: Tensor, weights: Tensor, decision: RoutingDecision
) -> Tensor:
    """Run a layer's experts on the pairs that are kept, and on no others: each as a token of its
    own, given to one expert.

    `hidden_states` is [N, D], `index` int64 [N, K] and `weights` [N, K] say to which experts a
    token goes and how much each counts. Returns the weighted sums [N, D].
    """
    pairs = decision.pairs
    if pairs.all:
        return run(hidden_states, index, weights)  # type: ignore[no-any-return]
    if pairs.none:
        return torch.zeros_like(hidden_states)
    tokens, choices = index.shape
    picked = hidden_states.index_select(0, pairs.index // choices)
    expert, weight = (pairs.select(x.flatten()).unsqueeze(1) for x in (index, weights))
    ran = run(picked, expert, weight)
    # Not added up in place: that is not deterministic on a GPU.
    return put_back(ran, pairs.index, tokens * choices).view(tokens, choices, -1).sum(1)
