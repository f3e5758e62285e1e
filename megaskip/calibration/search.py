"""The search for the threshold at which a text keeps an asked capacity. Pure arithmetic."""

import math
from collections.abc import Sequence

_CLOSED = 1e-6
"""Width of a bracket, of its position, in which float32 logits lie no more."""


class ThresholdSearch:
    """Proposes positions of the threshold from what was kept at those tried so far.

    If layers did not influence each other, the quantile of the logits would be the answer. They
    do, so from the third try on the secant through the last two proposes the next position. A
    proposal outside the bracket (the closest positions that kept too much and too little) is
    replaced by the middle of the bracket.

    Where the capacity falls steeply (many logits lie close together, or all layers hear one) few
    tries do not get there. `narrow` then shares the bracket by the logits that lie in it, so that
    each try leaves half of them or fewer.
    """

    def __init__(self, target: float) -> None:
        self._target = target
        self._tried: list[tuple[float, float]] = []

    @property
    def best(self) -> float:
        """Return the position that came closest."""
        return min(self._tried, key=self._distance)[0]

    @property
    def distance(self) -> float:
        """Return how far from the target the best position is."""
        return min(map(self._distance, self._tried))

    def note(self, position: float, kept: float) -> None:
        """Take in the share `kept` that was measured at `position`."""
        self._tried.append((position, kept))

    def next(self, quantile: float) -> float:
        """Return the position to try next; `quantile` is the position at which the logits of the
        last try would have kept the target."""
        too_much = (position for position, kept in self._tried if kept > self._target)
        too_little = (position for position, kept in self._tried if kept <= self._target)
        low, high = max(too_much, default=-math.inf), min(too_little, default=math.inf)
        proposed = self._secant(quantile)
        if math.isfinite(high - low) and not low < proposed < high:
            return (low + high) / 2
        return proposed

    def narrow(self, logits: Sequence[float]) -> float | None:
        """Return the position to try next inside the bracket; None where there is none.

        `logits` of units, ascending, are those of the last try. Every second proposal is the one at
        which a capacity that falls evenly over the logits in the bracket would be the target.
        """
        low, high, share = self._bracket()
        inside = [logit for logit in logits if low < logit < high]
        if len(inside) >= 2:
            at = round(share * len(inside)) if len(self._tried) % 2 else len(inside) // 2
            at = min(max(at, 1), len(inside) - 1)
            return (inside[at - 1] + inside[at]) / 2
        if not math.isfinite(low):
            return min([high, *logits[:1]]) - 1
        if not math.isfinite(high):
            return max([low, *logits[-1:]]) + 1
        middle = (low + high) / 2
        if logits[0] == logits[-1]:  # nothing divides them
            return None
        return middle if high - low > _CLOSED * max(abs(middle), 1.0) else None

    def _bracket(self) -> tuple[float, float, float]:
        """Return (the highest position that kept too much below the lowest that kept too little,
        that one, the share of what they differ by that is to be skipped)."""
        high, kept_at_high = min(
            (tried for tried in self._tried if tried[1] <= self._target),
            default=(math.inf, 0.0),
        )
        low, kept_at_low = max(
            (tried for tried in self._tried if tried[1] > self._target and tried[0] < high),
            default=(-math.inf, 1.0),
        )
        return low, high, (kept_at_low - self._target) / max(kept_at_low - kept_at_high, 1e-9)

    def _secant(self, quantile: float) -> float:
        if len(self._tried) < 2:
            return quantile
        (x0, y0), (x1, y1) = self._tried[-2:]
        # A higher threshold keeps less; where it did not, the line leads away.
        if (y1 - y0) * (x1 - x0) >= 0:
            return quantile
        return x1 + (self._target - y1) * (x1 - x0) / (y1 - y0)

    def _distance(self, tried: tuple[float, float]) -> float:
        return abs(tried[1] - self._target)
