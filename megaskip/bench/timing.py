"""Clocks that wait for the device, runs in pairs, and statistics of them. Knows no model."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Sample = tuple[float, ...]
"""Seconds of the phases of one run."""
Pairs = dict[Name, list[tuple[Sample, Sample]]]
"""By name: samples of the base and of itself."""


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Tells the time when the device has done what it was given."""

    device: torch.device
    clock: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        """Return seconds; only differences mean anything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return how long a call takes, with all work that it gives to the device."""
        begun = self.now()
        call()
        return self.now() - begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to stop taking turns."""

    turns: int
    warmup: int = 0
    """Turns before them that do not count."""
    until: float = math.inf
    """time.monotonic() after which no run is begun, but for the first."""

    def is_over(self) -> bool:
        """Return whether the time is up."""
        return time.monotonic() >= self.until


def timed_pairs(
    run: Callable[[Name], Sample], names: Sequence[Name], base: Name, limits: Limits
) -> Iterator[Pairs[Name]]:
    """Yield, after every turn, the samples of `base` and of each name, which ran one after the
    other.

    Which of the two is first changes with the turns, and so does the order of names; in the first
    turn those come first that were named first. When the time is up, names have fewer pairs, or
    none. A run that failed has samples of nan, which are left out.
    """
    pairs: Pairs[Name] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0).shuffle
    for turn in range(limits.warmup + limits.turns):
        for name in order:
            if limits.is_over() and any(pairs.values()):
                yield pairs
                return
            samples = {key: run(key) for key in ((base, name) if turn % 2 else (name, base))}
            counts = turn >= limits.warmup or limits.is_over()
            if counts and not any(map(math.isnan, (*samples[base], *samples[name]))):
                pairs[name].append((samples[base], samples[name]))
        shuffle(order)
        if turn >= limits.warmup:
            yield pairs


@dataclass(frozen=True, slots=True)
class Ratio:
    """How often as fast as its base something is."""

    value: float
    """Median over pairs of the base's seconds by its own; above 1 is faster."""
    error: float | None
    """Standard error of that median; None for a single pair."""


def speedup(pairs: Sequence[tuple[Sample, Sample]], phase: int = 0) -> Ratio:
    """Return how often as fast as the base a phase is."""
    ratios = [base[phase] / own[phase] for base, own in pairs]
    return Ratio(statistics.median(ratios), median_error(ratios))


def median_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a median, as for normal values of this interquartile range; None
    for a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return 1.2533 * (high - low) / 1.349 / float(len(values)) ** 0.5


def of_base(pairs: Pairs[Any]) -> list[tuple[Sample, Sample]]:
    """Return every sample of the base, paired with itself."""
    return [(base, base) for own in pairs.values() for base, _ in own]
