"""The search for the threshold at which a text keeps an asked capacity. Pure arithmetic."""

import math


class ThresholdSearch:
    """Proposes positions of the threshold from what was kept at those tried so far.

    The logits' quantile would be the answer if layers did not hear each other. They do, so after
    two tries the line through them says where to go; what falls outside the closest positions that
    kept too much and too little is replaced by the middle between them.
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
        """Take note of the share that was kept at a position."""
        self._tried.append((position, kept))

    def next(self, quantile: float) -> float:
        """Return the position to try next; `quantile` is where the last try's logits point to."""
        low = max((p for p, kept in self._tried if kept > self._target), default=-math.inf)
        high = min((p for p, kept in self._tried if kept <= self._target), default=math.inf)
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
