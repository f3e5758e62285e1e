"""Errors and intervals of metrics over documents, and of differences between two models on the same
ones. Knows numbers only.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Aggregate = Callable[[list[Any]], Any]
"""A metric of a list of per-document values."""

_NORMAL_95 = 1.959964
_RESAMPLES = 1000
_SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A metric's difference between two models, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def standard_error(values: Sequence[Any], aggregate: Aggregate | None) -> float | None:
    """Return the standard error over documents; `aggregate` is None for a mean of numbers."""
    if len(values) < 2:
        return None
    if aggregate is None:
        return statistics.stdev(map(float, values)) / math.sqrt(len(values))
    return statistics.stdev(_bootstrap(len(values), lambda at: aggregate([values[i] for i in at])))


def difference(
    ours: Sequence[Any], theirs: Sequence[Any], aggregate: Aggregate | None
) -> Difference:
    """Return aggregate(ours) - aggregate(theirs), paired by document.

    A mean's interval is normal; others are percentiles of a bootstrap over documents.
    """
    if aggregate is None:
        gaps = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
        value = statistics.fmean(gaps)
        half = _NORMAL_95 * (standard_error(gaps, None) or 0.0)
        return Difference(value=value, low=value - half, high=value + half)

    def gap(at: Sequence[int]) -> float:
        return float(aggregate([ours[i] for i in at])) - float(aggregate([theirs[i] for i in at]))

    drawn = sorted(_bootstrap(len(ours), gap))
    edge = int(0.025 * len(drawn))
    return Difference(value=gap(range(len(ours))), low=drawn[edge], high=drawn[-1 - edge])


def ratio_difference(ours: ArrayLike, theirs: ArrayLike, weights: ArrayLike) -> Difference:
    """Return sum(ours - theirs) / sum(weights), paired by document; all are [N].

    With losses and token counts it is the difference in nats a token; with hits and ones, in share.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    sizes, rng = np.asarray(weights, dtype=np.float64), np.random.default_rng(_SEED)
    drawn = []
    for _ in range(_RESAMPLES):
        at = rng.integers(len(gaps), size=len(gaps))
        drawn.append(gaps[at].sum() / sizes[at].sum())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(value=float(gaps.sum() / sizes.sum()), low=float(low), high=float(high))


def _bootstrap(count: int, measure: Callable[[Sequence[int]], float]) -> list[float]:
    rng = random.Random(_SEED)
    return [float(measure(rng.choices(range(count), k=count))) for _ in range(_RESAMPLES)]
