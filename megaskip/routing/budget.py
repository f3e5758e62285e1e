"""The capacity penalty: steered for the whole model, or the published hinge for each layer."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.routing.counts import Counts
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
    hinges = [torch.relu(d.kept() / d.units().clamp(min=1) - target) for d in decisions]
    return weight * torch.stack(hinges).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the routers did over a global batch, over all routed layers."""

    capacity: float
    units: float
    spread: float
    """Standard deviation of the logits."""
    excess: tuple[float, ...] = ()
    """By how much each layer's capacity is above that of all."""

    @classmethod
    def of(cls, counts: Counts) -> "Measured":
        """Return the measurement from the counts of the global batch."""
        by_layer = counts.kept.tolist(), counts.units.tolist()
        kept, units = sum(by_layer[0]), max(sum(by_layer[1]), 1.0)
        logits, squares = sum(counts.logits.tolist()), sum(counts.squares.tolist())
        capacity, variance = kept / units, max(squares / units - (logits / units) ** 2, 0.0)
        return cls(
            capacity=capacity,
            units=units,
            spread=math.sqrt(variance),
            excess=tuple(k / max(u, 1.0) - capacity for k, u in zip(*by_layer, strict=True)),
        )


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
    than it costs, and the penalty price * (capacity - target) brings the logits back to it.

    A layer that kept more than the average in the last global batch pays the published hinge on
    top; one that kept less pays no less. Without that, the layers that skip first skip everything,
    and learn no more which of their units are worth running (docs/lab.md, "A layer that keeps
    more").

    The penalty is linear in every decision, so the parts of micro-batches and ranks add up to the
    global one exactly.
    """

    def __init__(self, *, target: float, gain: float) -> None:
        self.target = target
        self.gain = gain
        self.position = 0.0
        self.spread = 0.0
        self.error = 1.0 - target
        self.excess: tuple[float, ...] = ()

    @property
    def offset(self) -> float:
        """Return how far the threshold has moved, in logits."""
        return self.position * self.spread

    @property
    def price(self) -> float:
        """Return the loss that a unit of capacity has to be worth to stay."""
        return self.gain * (self.position + self.error)

    def penalty(self, kept: Tensor, units: Tensor, total_units: Tensor | float) -> Tensor:
        """Return this part's share of price * (capacity - target), from float32 [R] by layer."""
        # Written by the device: a copy from the host would be waited for.
        prices = torch.stack([kept.new_full((), price) for price in self._prices(len(kept))])
        return (prices * (kept - self.target * units)).sum() / total_units

    def _prices(self, layers: int) -> list[float]:
        # The hinge's slope is in the layer's own capacity, which is 1 / layers of all.
        hinge = self.gain * layers
        return [self.price + hinge * (excess > 0) for excess in self.excess or [0.0] * layers]

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
        self.excess = measured.excess
        self.position += gain * min(measured.units / _FULL_GAIN_UNITS, 1.0) * self.error

    def settled_offset(self) -> float:
        """Return where the threshold of the asked capacity is, in logits."""
        return self.offset

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Let decisions in here be those at the threshold of the asked capacity."""
        yield

    def _target_at(self, progress: float | None) -> float:
        return self.target if progress is None else ramped(self.target, progress)

    def place(self, offset: float) -> None:
        """Put the threshold at `offset`, in logits; the price stays what it is."""
        self.spread = self.spread or 1.0
        self.error += self.position - offset / self.spread
        self.position = offset / self.spread

    def state(self) -> dict[str, float]:
        """Return what the steering remembers."""
        excess = {f"excess_{index}": value for index, value in enumerate(self.excess)}
        steered = {"position": self.position, "spread": self.spread, "error": self.error}
        return steered | excess

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        self.position, self.spread, self.error = state["position"], state["spread"], state["error"]
        layers = sum(name.startswith("excess_") for name in state)
        self.excess = tuple(state[f"excess_{index}"] for index in range(layers))
