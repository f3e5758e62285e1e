"""The search for the threshold at which a text keeps an asked capacity. Pure arithmetic."""

import math


class ThresholdSearch:
    """Proposes positions of the threshold from what was kept at those tried so far.

    If layers did not influence each other, the quantile of the logits would be the answer. They
    do, so from the third try on the secant through the last two proposes the next position. A
    proposal outside the bracket (the closest positions that kept too much and too little) is
    replaced by the middle of the bracket.
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
