"""Which tokenised rows are trained on, held out and packed together. Knows numbers, not rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaskip.config import DataConfig
from megaskip.data.mix import mix
from megaskip.data.order import permutation
from megaskip.data.pack import pack
from megaskip.data.source import Source
from megaskip.errors import DataError

_HELD_OUT = 3  # keeps these random numbers apart from the other uses of the seed


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowPlan:
    """What becomes of the rows; all arrays hold row indices."""

    train: NDArray[np.int64]
    """One epoch; a row whose source has weight 2 is in it twice."""
    packs: list[list[int]] | None
    """Positions in `train` that share a row of a batch; None without --packing."""
    held_out: NDArray[np.int64]
    duplicates: NDArray[np.int64]
    """Copies of held-out rows, which must not be trained on."""
    leaked: int = 0
    """Rows of --eval_data that are trained on, too."""

    @property
    def num_train_rows(self) -> int:
        """Rows of one epoch, after weights and packing."""
        return len(self.train) if self.packs is None else len(self.packs)

    def num_not_drawn(self, num_rows: int) -> int:
        """Return how many of `num_rows` rows are neither trained on nor held out, though no
        held-out row is like them: the weight of their source is below 1."""
        outside = len(self.held_out) + len(self.duplicates)
        return num_rows - len(np.unique(self.train)) - outside


def plan_rows(
    config: DataConfig,
    sources: Sequence[Source],
    hashes: NDArray[np.uint64],
    source_of: NDArray[np.int32],
    lengths: NDArray[np.int64],
    *,
    num_train: int,
) -> RowPlan:
    """Return the plan for rows of which the first `num_train` are from --data, the others from
    --eval_data.

    `sources` are those of --data; `hashes`, `source_of` and `lengths` have one entry per row.
    Raises DataError when no training row is left.
    """
    nothing = np.empty(0, dtype=np.int64)
    if config.eval_data:
        held_out, duplicates = np.arange(num_train, len(lengths)), nothing
        rest = np.arange(num_train)
    else:
        held_out, duplicates = _split(hashes, config.held_out)
        rest = np.setdiff1d(np.arange(num_train), np.concatenate([held_out, duplicates]))
    weights = [source.weight for source in sources]
    train = rest[mix(source_of[rest], weights=weights, seed=config.seed)]
    if not len(train):
        raise DataError(
            f"--data {' '.join(config.data)}: no training row is left; raise the weights"
        )
    packs = pack(lengths[train].tolist(), seq_length=config.seq_length) if config.packing else None
    # numpy 2.0 cannot make a table of numbers beyond int64, which it tries for few of them.
    leaked = int(np.isin(hashes[held_out], hashes[train], kind="sort").sum())
    return RowPlan(
        train=train, packs=packs, held_out=held_out, duplicates=duplicates, leaked=leaked
    )


def _split(hashes: NDArray[np.uint64], wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the held-out rows, and the copies of them that must leave the training rows.

    The choice is the same for every seed, so that runs with other seeds can be compared on rows
    that none of them was trained on. Both together are at most a fifth of the rows: a row with
    too many copies is not held out.
    """
    _, group, copies = np.unique(hashes, return_inverse=True, return_counts=True)
    room = len(hashes) // 5
    chosen: dict[int, int] = {}
    for row in permutation(len(hashes), 0, _HELD_OUT):
        if len(chosen) == wanted or room == 0:
            break
        if group[row] not in chosen and copies[group[row]] <= room:
            chosen[int(group[row])] = int(row)
            room -= copies[group[row]]
    held_out = np.sort(np.fromiter(chosen.values(), dtype=np.int64, count=len(chosen)))
    leaving = np.flatnonzero(np.isin(group, list(chosen)))
    return held_out, np.setdiff1d(leaving, held_out)
