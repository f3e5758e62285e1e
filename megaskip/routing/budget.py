"""The capacity penalty: a steered price for the whole model, or the published hinge for each
layer."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision


def layer_hinge(decisions: Iterable[RoutingDecision], target: float, weight: float) -> Tensor:
    """Return weight * sum over layers of relu(mean(keep) - target), as published (paper eqs. 9 and
    10)."""
    hinges = [torch.relu(one.kept() / one.units().clamp(min=1) - target) for one in decisions]
    return weight * torch.stack(hinges).sum()


class Budget:
    """The price of capacity, moved until the asked capacity is hit (method of multipliers).

    The penalty is price * (capacity - target), linear in every decision, so the parts of
    micro-batches and ranks add up to the global one exactly. The price is an integral of the
    capacity's error plus a share of the error itself. A hinge per micro-batch has no equilibrium at
    the target: at one sequence a micro-batch its gradient does not depend on the target at all.
    """

    def __init__(self, *, target: float, gain: float) -> None:
        self.target = target
        self.gain = gain
        self.integral = 0.0
        self.error = 1.0 - target

    @property
    def price(self) -> float:
        """Return the loss that a unit of capacity has to be worth to stay."""
        return self.integral + self.gain * self.error

    def penalty(self, kept: Tensor, units: Tensor, total_units: Tensor | float) -> Tensor:
        """Return this part's share of price * (capacity - target)."""
        return self.price * (kept - self.target * units) / total_units

    def state(self) -> dict[str, float]:
        """Return what the steering remembers."""
        return {"integral": self.integral, "error": self.error}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        self.integral, self.error = state["integral"], state["error"]

    def steer(self, capacity: float) -> None:
        """Take in the capacity of a global batch."""
        self.error = capacity - self.target
        self.integral += self.gain * self.error
