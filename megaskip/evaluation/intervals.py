"""Differences between two ways to run a model, paired by document, with 95 % intervals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_RESAMPLES = 2000
_SEED = 1234


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A difference and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def ratio_difference(ours: Numbers, theirs: Numbers, weights: Numbers) -> Interval:
    """Return sum(ours - theirs) / sum(weights), bootstrapped over documents; all are [N].

    With losses and token counts it is the difference in nats a token; with hits and ones, in share.
    """
    gaps = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    rng = np.random.default_rng(_SEED)
    drawn = np.empty(_RESAMPLES)
    for index in range(_RESAMPLES):
        at = rng.integers(0, len(gaps), len(gaps))
        drawn[index] = gaps[at].sum() / weights[at].sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value=float(gaps.sum() / weights.sum()), low=float(low), high=float(high))
