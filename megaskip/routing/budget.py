"""The capacity penalty: steered for the whole model, or the published hinge for each layer."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision

_RAMP = 0.2
"""Share of a run in which the target falls from 1 to the asked capacity: routers learn to rank
first."""
_FULL_GAIN_UNITS = 64
"""Decisions a step from which on the threshold follows the capacity at full gain; fewer are
noise."""
_LAST_GAIN = 0.05
_SPREAD_MEMORY = 0.9


def layer_hinge(decisions: Iterable[RoutingDecision], target: float, weight: float) -> Tensor:
    """Return weight * sum over layers of relu(mean(keep) - target), as published (paper eqs. 9,
    10)."""
    hinges = [torch.relu(one.kept() / one.units().clamp(min=1) - target) for one in decisions]
    return weight * torch.stack(hinges).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the routers did over a global batch, over all routed layers."""

    capacity: float
    units: float
    spread: float
    """Standard deviation of the logits."""

    @classmethod
    def of(cls, kept: float, units: float, logits: float, squares: float) -> "Measured":
        """Return the measurement from sums over all units: kept, seen, logits and squared
        logits."""
        units = max(units, 1.0)
        variance = max(squares / units - (logits / units) ** 2, 0.0)
        return cls(capacity=kept / units, units=units, spread=math.sqrt(variance))


def ramped(target: float, progress: float) -> float:
    """Return the target at `progress`, the share of a run that is done."""
    return 1 - (1 - target) * min(progress / _RAMP, 1.0)


class Budget:
    """Holds the whole model to one capacity, by a threshold that moves and a price that follows it.

    A price alone cannot hit a capacity: all logits of a linear router move together, so a price
    that falls below their worth keeps everything and one above it skips everything, in turns. Here
    one number, the position of the threshold in spreads of the logits, follows the error of the
    capacity (stochastic approximation of a quantile); it shifts the threshold of all layers alike.
    The price is proportional to it: a threshold that had to rise says that running is worth more
    than it costs, and the penalty price * (capacity - target) brings the logits back to it. The
    penalty is linear in every decision, so the parts of micro-batches and ranks add up to the
    global one exactly.
    """

    def __init__(self, *, target: float, gain: float) -> None:
        self.target = target
        self.gain = gain
        self.position = 0.0
        self.spread = 0.0
        self.error = 1.0 - target

    @property
    def offset(self) -> float:
        """Return how far the threshold has moved, in logits."""
        return self.position * self.spread

    @property
    def price(self) -> float:
        """Return the loss that a unit of capacity has to be worth to stay."""
        return self.gain * (self.position + self.error)

    def penalty(self, kept: Tensor, units: Tensor, total_units: Tensor | float) -> Tensor:
        """Return this part's share of price * (capacity - target)."""
        return self.price * (kept - self.target * units) / total_units

    def steer(self, measured: Measured, progress: float | None) -> None:
        """Take in a global batch. `progress` is the share of the run that is done, None if
        unknown."""
        target, gain = self._target_at(progress), 1.0
        if progress is not None:
            gain = max(1 - progress, _LAST_GAIN)
        memory = _SPREAD_MEMORY if self.spread > 0 else 0.0
        variance = memory * self.spread**2 + (1 - memory) * measured.spread**2
        self.spread = math.sqrt(variance)
        self.error = measured.capacity - target
        self.position += gain * min(measured.units / _FULL_GAIN_UNITS, 1.0) * self.error

    def settled_offset(self) -> float:
        """Return where the threshold of the asked capacity is, in logits."""
        return self.offset

    def _target_at(self, progress: float | None) -> float:
        return self.target if progress is None else ramped(self.target, progress)

    def place(self, offset: float) -> None:
        """Put the threshold at `offset`, in logits; the price stays what it is."""
        self.spread = self.spread or 1.0
        self.error += self.position - offset / self.spread
        self.position = offset / self.spread

    def state(self) -> dict[str, float]:
        """Return what the steering remembers."""
        return {"position": self.position, "spread": self.spread, "error": self.error}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        self.position, self.spread, self.error = state["position"], state["spread"], state["error"]
