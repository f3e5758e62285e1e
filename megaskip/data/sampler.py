"""Which rows make up step n, and which of them this rank takes: pure functions, no state."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megaskip.data.order import permutation
from megaskip.errors import ConfigError, DataError

_EPOCH = 2  # keeps these random numbers apart from the other uses of the seed


class GlobalBatchOrder:
    """The rows of every global batch: a new permutation each epoch; batches cross epochs."""

    def __init__(self, num_rows: int, global_batch_size: int, seed: int) -> None:
        if num_rows < 1:
            raise DataError("the training data hold no rows")
        if global_batch_size < 1:
            raise ConfigError(f"the global batch size {global_batch_size} must be at least 1")
        self.num_rows = num_rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._last: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def indices(self, step: int) -> list[int]:
        """Return the rows of global batch `step` (from 0): equal on all ranks, after any resume."""
        first = step * self.global_batch_size
        return [self._row(position) for position in range(first, first + self.global_batch_size)]

    def epoch(self, step: int) -> float:
        """Return how many passes over the data are complete before `step`."""
        return step * self.global_batch_size / self.num_rows

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        if self._last[0] != epoch:
            self._last = (epoch, permutation(self.num_rows, self.seed, epoch, _EPOCH))
        return int(self._last[1][offset])


def shard(
    indices: Sequence[int], *, rank: int, world_size: int, micro_batch_size: int
) -> list[list[int]]:
    """Return this rank's micro-batches: m takes indices[(m * world_size + rank) * mbs :][:mbs].

    Over all ranks and micro-batches each index is taken exactly once, however the batch is split.
    """
    share = world_size * micro_batch_size
    if not indices or len(indices) % share:
        raise ConfigError(
            f"a global batch of {len(indices)} rows cannot be split over {world_size} "
            f"data-parallel ranks with --micro_batch_size {micro_batch_size}: it must be a "
            f"multiple of {share}"
        )
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    starts = range(rank * micro_batch_size, len(indices), share)
    return [list(indices[start : start + micro_batch_size]) for start in starts]
