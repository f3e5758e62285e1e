"""What routed layers did, as sums that add up over micro-batches and ranks. Knows no processes.

Shapes: R routed layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from megaskip.routing.decision import RoutingDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums over the real units of each routed layer, float64 [R] each."""

    kept: Tensor
    """Units that ran."""
    units: Tensor
    """Units that were decided about."""
    logits: Tensor
    """Sum of the routers' logits."""
    squares: Tensor
    """Sum of the squared logits."""

    @classmethod
    def zeros(cls, layers: int, *, device: torch.device | None = None) -> "Counts":
        """Return counts of nothing, for `layers` routed layers."""
        return cls.unpack(torch.zeros(cls.size(layers), dtype=torch.float64, device=device))

    @classmethod
    def of(cls, decisions: Iterable[RoutingDecision]) -> "Counts":
        """Return the counts of one forward pass, from its decisions in the order of the layers."""
        columns = []
        for decision in decisions:
            logit = decision.logit.detach().double() * decision.unit_mask
            kept, units = decision.kept().detach(), decision.units()
            columns.append(torch.stack([kept.double(), units, logit.sum(), logit.square().sum()]))
        return cls.unpack(torch.stack(columns, dim=1).flatten())

    @classmethod
    def size(cls, layers: int) -> int:
        """Return how many numbers `pack` returns for `layers` routed layers."""
        return len(fields(cls)) * layers

    @classmethod
    def unpack(cls, packed: Tensor) -> "Counts":
        """Return the counts that `pack` made into one tensor [4 * R]; they share its memory."""
        kept, units, logits, squares = packed.view(len(fields(cls)), -1)
        return cls(kept=kept, units=units, logits=logits, squares=squares)

    def pack(self) -> Tensor:
        """Return one tensor float64 [4 * R], so that one all-reduce sums everything."""
        return torch.cat([self.kept, self.units, self.logits, self.squares])

    def among(self, layers: int, first: int) -> "Counts":
        """Return these counts as those of the routed layers from number `first` on, of `layers`;
        zero for the others."""
        rest = layers - first - len(self.kept)
        return Counts(
            kept=pad(self.kept, (first, rest)),
            units=pad(self.units, (first, rest)),
            logits=pad(self.logits, (first, rest)),
            squares=pad(self.squares, (first, rest)),
        )

    def __add__(self, other: "Counts") -> "Counts":
        """Return the counts of both."""
        return Counts.unpack(self.pack() + other.pack())

    def capacity(self) -> float:
        """Return the share of all layers' units that ran; 0 where nothing was seen."""
        return float(self.kept.sum()) / max(float(self.units.sum()), 1.0)

    def capacity_per_layer(self) -> tuple[float, ...]:
        """Return the share of each layer's units that ran; 0 where nothing was seen."""
        pairs = zip(self.kept.tolist(), self.units.tolist(), strict=True)
        return tuple(kept / max(units, 1.0) for kept, units in pairs)
