"""Sources mixed by weight: how often each row is seen, and in which order. Knows indices only."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megaskip.data.order import hashed, hashed_one

T = TypeVar("T")

_SAMPLE = 1  # keeps these random numbers apart from the other uses of the seed


def mix(
    source_of: NDArray[np.integer], *, weights: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Return the row indices of one epoch: rows of source s appear `weights[s]` times on average.

    Weight 2.5 gives each row twice and exactly half of them, chosen by `seed`, a third time.
    """
    streams = [
        _passes(np.flatnonzero(source_of == source), weight, seed, source)
        for source, weight in enumerate(weights)
    ]
    return np.fromiter(interleave(streams, rates=weights), dtype=np.int64)


def interleave(streams: Sequence[Iterable[T]], *, rates: Sequence[float]) -> Iterator[T]:
    """Merge streams: until one ends, each has given in proportion to its rate."""
    iterators = [iter(stream) for stream in streams]
    queue = [(0.0, index, 0) for index in range(len(iterators))]
    heapq.heapify(queue)
    while queue:
        _, index, given = heapq.heappop(queue)
        try:
            item = next(iterators[index])
        except StopIteration:
            continue
        yield item
        heapq.heappush(queue, ((given + 1) / rates[index], index, given + 1))


def in_pass(index: int, *, weight: float, number: int, seed: int, source: int) -> bool:
    """Return whether pass `number` of a stream shows row `index`; needs no row count.

    The last, partial pass keeps a share of about the weight's fraction, not exactly that.
    """
    share = weight - number
    return share >= 1 or hashed_one(index, seed, source, _SAMPLE) < share * 2**64


def num_passes(weight: float) -> int:
    return math.ceil(weight)


def _passes(rows: NDArray[np.int64], weight: float, seed: int, source: int) -> Iterator[int]:
    whole = math.floor(weight)
    for _ in range(whole):
        yield from rows.tolist()
    share = round(len(rows) * (weight - whole))
    chosen = np.argsort(hashed(len(rows), seed, source, _SAMPLE), kind="stable")[:share]
    yield from rows[np.sort(chosen)].tolist()
