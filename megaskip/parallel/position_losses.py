"""Held-out losses by the position of what is predicted: what long rows are for, seen in numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.data import Batch
from megaskip.parallel.collectives import sum_over_ranks

SPANS = 8
"""Equal parts of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLoss:
    """What tokens at neighbouring positions cost."""

    first: int
    stop: int
    """One past the last position."""
    loss: float
    """Mean, nats."""
    tokens: int


class PositionLosses:
    """Sums of the losses of tokens, by span of a row of at most `tokens` tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self._tokens = tokens
        self._sums = torch.zeros(2, SPANS, dtype=torch.float64, device=device)

    def add(self, batch: Batch, losses: Tensor) -> None:
        """Take in the losses float32 [N] of the supervised tokens of a batch, in their order."""
        device = losses.device
        predicting = batch.position_ids.flatten()[batch.predicting].to(device)
        span = ((predicting + 1) * SPANS // self._tokens).clamp(max=SPANS - 1)
        both = torch.stack([losses, torch.ones_like(losses)]).double()
        self._sums.index_add_(1, span, both)

    def over_ranks(self) -> list[SpanLoss]:
        """Return the spans in which tokens were predicted, over all ranks. Collective."""
        sums = self._sums.clone()
        sum_over_ranks(sums)
        edges = [-(-number * self._tokens // SPANS) for number in range(SPANS + 1)]
        return [
            SpanLoss(first=first, stop=stop, loss=loss / count, tokens=int(count))
            for first, stop, loss, count in zip(edges, edges[1:], *sums.tolist(), strict=False)
            if count
        ]
