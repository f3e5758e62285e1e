"""The capacity penalty: steered for the whole model, or the published hinge for each layer."""

import contextlib
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
_FROZEN_GAIN = 0.05
"""Of the usual one. Predicted costs lie close together near a threshold, while a few costly layers
make their spread large: at the usual gain the capacity swings (docs/lab.md, "Training the maps
under frozen routers")."""
_SPREAD_MEMORY = 0.9

Number = float | Tensor
"""Of the host, or float64 [] where the model trains: the host need not wait for what a step did to
know what the next one does."""


def layer_hinge(decisions: Iterable[RoutingDecision], target: float, weight: float) -> Tensor:
    """Return weight * sum over layers of relu(mean(keep) - target), as published (paper eqs. 9,
    10)."""
    hinges = [torch.relu(d.kept() / d.units().clamp(min=1) - target) for d in decisions]
    return weight * torch.stack(hinges).sum()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """What the routers did over a global batch, over all routed layers."""

    capacity: Number
    units: Number
    spread: Number
    """Standard deviation of the logits."""

    @classmethod
    def of(cls, counts: Counts) -> "Measured":
        """Return the measurement from the counts of the global batch, on their device."""
        units = counts.units.sum().clamp(min=1.0)
        mean, square = _in_order(counts.logits) / units, _in_order(counts.squares) / units
        return cls(
            capacity=counts.kept.sum() / units,
            units=units,
            spread=(square - mean.square()).clamp(min=0.0).sqrt(),
        )


def _in_order(values: Tensor) -> Tensor:
    """Return the sum [] of values [R], added up from the first to the last on a CPU."""
    return values.cumsum(0)[-1]


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

    All layers pay the same price: what a layer is worth differs a hundredfold between layers, so
    nothing holds them level (docs/lab.md, "Holding layers level, on the real model").

    The penalty is linear in every decision, so the parts of micro-batches and ranks add up to the
    global one exactly.
    """

    def __init__(self, *, target: float, gain: float, learns: bool = True) -> None:
        """Routers that do not learn begin at a threshold that is nearly right: they are held to
        `target` from the first step on, by small moves of it."""
        self.target = target
        self.gain = gain
        self._learns = learns
        self.position: Number = 0.0
        self.spread: Number = 0.0
        self.error: Number = 1.0 - target

    @property
    def offset(self) -> Number:
        """Return how far the threshold has moved, in logits."""
        return self.position * self.spread

    @property
    def price(self) -> Number:
        """Return the loss that a unit of capacity has to be worth to stay."""
        return self.gain * (self.position + self.error)

    def penalty(self, kept: Tensor, units: Tensor, total_units: Tensor | float) -> Tensor:
        """Return this part's share of price * (capacity - target), from float32 [R] by layer."""
        return (self.price * (kept - self.target * units)).sum() / total_units

    def steer(self, measured: Measured, progress: float | None) -> None:
        """Take in a global batch, where `measured` is. `progress` is the share of the run that is
        done, None if unknown."""
        target, gain = self._target_at(progress), 1.0 if self._learns else _FROZEN_GAIN
        if progress is not None:
            gain *= max(1 - progress, _LAST_GAIN)
        before, spread, units = map(_tensor, (self.spread, measured.spread, measured.units))
        memory = _SPREAD_MEMORY * (before > 0).double()
        self.spread = (memory * before.square() + (1 - memory) * spread.square()).sqrt()
        self.error = measured.capacity - target
        full = (units / _FULL_GAIN_UNITS).clamp(max=1.0)
        self.position = self.position + gain * full * self.error

    def settled_offset(self) -> float:
        """Return where the threshold of the asked capacity is, in logits; waits for a device."""
        return float(self.offset)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Let decisions in here be those at the threshold of the asked capacity."""
        yield

    def _target_at(self, progress: float | None) -> float:
        if progress is None or not self._learns:
            return self.target
        return ramped(self.target, progress)

    def place(self, offset: float) -> None:
        """Put the threshold at `offset`, in logits; the price stays what it is. Waits for a
        device."""
        self.spread = float(self.spread) or 1.0
        position = offset / self.spread
        self.error = float(self.error) + (float(self.position) - position)
        self.position = position

    def state(self) -> dict[str, float]:
        """Return what the steering remembers; waits for a device."""
        return _floats({"position": self.position, "spread": self.spread, "error": self.error})

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        self.position, self.spread, self.error = state["position"], state["spread"], state["error"]


def _tensor(number: Number) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64)


def _floats(numbers: Mapping[str, Number]) -> dict[str, float]:
    return {name: float(number) for name, number in numbers.items()}
