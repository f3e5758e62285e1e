"""A budget that trains one set of routers for every capacity: each step asks for another one."""

import contextlib
from collections.abc import Iterator, Mapping

from megaskip.routing.budget import Budget, Measured, Number, ramped

_KNOTS = 6
_BELOW = 0.4
"""The smallest capacity trained for, as a share of the smallest that will be asked for: routers are
at their worst at the end of what they saw (docs/lab.md, "Beyond the capacities that are asked")."""


def golden_fraction(number: int) -> float:
    """Return a number of the golden-ratio sequence in [0, 1), which covers it evenly at any
    length."""
    return number * 0.6180339887498949 % 1.0


class AnyBudget(Budget):
    """Draws each step's target from [_BELOW * low, 1]; knows the threshold's position for them all.

    The position is a piecewise linear function of the target. A step's error moves the two knots
    around its target, by their share in it, as Budget moves its one position: the same stochastic
    approximation, for every quantile. Targets are the golden-ratio sequence, which covers the range
    evenly, is the same on every rank and needs no random state.
    """

    def __init__(self, *, asked: float, low: float, gain: float) -> None:
        super().__init__(target=1.0, gain=gain)
        self._asked = asked
        self._low = _BELOW * low
        self._steps = 0
        self._knots: list[Number] = [0.0] * _KNOTS

    def steer(self, measured: Measured, progress: float | None) -> None:
        """Take in a global batch, then draw the next target; early in a run they lie near 1."""
        before = self.position
        super().steer(measured, progress)
        self._move(self.position - before)
        self._steps += 1
        low = self._low if progress is None else ramped(self._low, progress)
        self._aim(1 - (1 - low) * (golden_fraction(self._steps)))

    def settled_offset(self) -> float:
        """Return where the threshold of the asked capacity is, in logits; waits for a device."""
        return float(self._position_of(self._asked) * self.spread)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Let decisions in here be those at the threshold of the asked capacity."""
        aim = self.target, self.position
        self._aim(self._asked)
        try:
            yield
        finally:
            self.target, self.position = aim

    def place(self, offset: float) -> None:
        """Put the threshold of the asked capacity at `offset`, in logits, and aim at it."""
        self._knots = [float(knot) for knot in self._knots]
        self._aim(self._asked)
        before = self.position
        super().place(offset)
        self._move(self.position - before)

    def state(self) -> dict[str, float]:
        """Return what the steering remembers."""
        knots = {f"knot_{index}": float(knot) for index, knot in enumerate(self._knots)}
        return super().state() | {"target": self.target, "steps": float(self._steps)} | knots

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        super().restore(state)
        self.target, self._steps = state["target"], int(state["steps"])
        self._knots = [state[f"knot_{index}"] for index in range(_KNOTS)]

    def _target_at(self, progress: float | None) -> float:
        return self.target

    def _aim(self, target: float) -> None:
        self.target, self.position = target, self._position_of(target)

    def _position_of(self, target: float) -> Number:
        shares = self._shares(target)
        return sum(share * knot for share, knot in zip(shares, self._knots, strict=True))

    def _move(self, step: Number) -> None:
        """Move the position of the current target by `step`, through the knots around it."""
        shares = self._shares(self.target)
        scale = step / sum(share * share for share in shares)
        self._knots = [
            knot + share * scale for share, knot in zip(shares, self._knots, strict=True)
        ]

    def _shares(self, target: float) -> list[float]:
        """Return how much each knot counts at `target`; they add up to 1."""
        at = (target - self._low) / max(1 - self._low, 1e-9) * (_KNOTS - 1)
        at = min(max(at, 0.0), _KNOTS - 1.0)
        return [max(1 - abs(at - index), 0.0) for index in range(_KNOTS)]
