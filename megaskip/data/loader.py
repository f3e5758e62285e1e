"""The micro-batches of each step for one rank: a pure function of the step for stored data, a
stream otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megaskip.data.collate import Batch, collate
from megaskip.data.dataset import TokenizedData
from megaskip.data.row import AnyRow
from megaskip.data.sampler import GlobalBatchOrder, shard
from megaskip.data.store import StoredRows
from megaskip.data.streaming import StreamingRows
from megaskip.errors import DataError

_PADDED_TO = 8
"""Tokens of which a rank's share of a row holds a multiple."""
_FORWARD_ONLY = 4
"""Times the micro-batch size that a forward pass alone takes: it keeps no activations."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLoader:
    """This rank's share of the global batches: of their rows, and of the tokens of a row where
    ranks share those.

    Rows of stored data have numbers: first those to train on, then the held-out ones.
    """

    data: TokenizedData
    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    seed: int
    pad_token_id: int
    prompt_tokens: int
    sequence_rank: int = 0
    """Which share of the tokens of each row is this rank's."""
    sequence_size: int = 1
    """Ranks that share the tokens of each row."""

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of step `first`, `first` + 1, ... without end."""
        if isinstance(self.data.train, StreamingRows):
            yield from self._stream(self.data.train, first)
            return
        for micro_batches in self.step_rows(first):
            yield [self.batch(numbers) for numbers in micro_batches]

    def held_out(self) -> list[Batch | None]:
        """Return this rank's held-out batches, for forward passes only."""
        if isinstance(self.data.train, StreamingRows):
            return [self._collated(rows) for rows in self._spread(list(self.data.held_out))]
        return [self._batch_or_none(numbers) for numbers in self.held_out_rows()]

    def calibration(self, count: int) -> list[Batch | None]:
        """Return this rank's share of `count` training rows, for forward passes only."""
        if isinstance(self.data.train, StreamingRows):
            rows = list(islice(_endless(self.data.train, 0), count))
            return [self._collated(share) for share in self._spread(rows)]
        return [self._batch_or_none(numbers) for numbers in self.calibration_rows(count)]

    # -- rows of stored data by number

    def step_rows(self, first: int) -> Iterator[list[list[int]]]:
        """Yield the rows of this rank's micro-batches of step `first`, `first` + 1, ... without
        end."""
        order = GlobalBatchOrder(self.num_train, self.global_batch_size, self.seed)
        step = first
        while True:
            yield self._shard(order.indices(step))
            step += 1

    def held_out_rows(self) -> list[list[int] | None]:
        """Return the rows of this rank's held-out batches."""
        first = self.num_train
        return self._spread(range(first, first + len(self.data.held_out)))

    def calibration_rows(self, count: int) -> list[list[int] | None]:
        """Return the rows of this rank's share of `count` training rows."""
        count = min(count, self.num_train)
        return self._spread(GlobalBatchOrder(self.num_train, count, self.seed).indices(0))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Return rows side by side; this rank's share of their tokens."""
        return self._collate([self._row(number) for number in numbers], numbers)

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each row, by its number."""
        assert not isinstance(self.data.train, StreamingRows)
        return np.concatenate([_lengths(rows) for rows in (self.data.train, self.data.held_out)])

    @property
    def num_train(self) -> int:
        """Return the number of stored rows to train on."""
        assert not isinstance(self.data.train, StreamingRows)
        return len(self.data.train)

    def _row(self, number: int) -> AnyRow:
        assert not isinstance(self.data.train, StreamingRows)
        beyond = number - self.num_train
        return self.data.train[number] if beyond < 0 else self.data.held_out[beyond]

    # -- shares

    def _spread(self, rows: Sequence[T]) -> list[list[T] | None]:
        """Return the rows of this rank's batches: as many on every rank, None where its rows are
        used up."""
        size = _FORWARD_ONLY * self.micro_batch_size
        mine = rows[self.rank :: self.world_size]
        batches: list[list[T] | None] = [
            list(mine[i : i + size]) for i in range(0, len(mine), size)
        ]
        longest_share = -(-len(rows) // self.world_size)
        return batches + [None] * (-(-longest_share // size) - len(batches))

    def _batch_or_none(self, numbers: Sequence[int] | None) -> Batch | None:
        return None if numbers is None else self.batch(numbers)

    def _stream(self, rows: StreamingRows, first: int) -> Iterator[list[Batch]]:
        epochs = _endless(rows, first * self.global_batch_size)
        while True:
            batch = list(islice(epochs, self.global_batch_size))
            yield [
                self._collate([batch[i] for i in micro_batch])
                for micro_batch in self._shard(range(len(batch)))
            ]

    def _shard(self, indices: Sequence[int]) -> list[list[int]]:
        return shard(
            indices,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
        )

    def _collate(self, rows: Sequence[AnyRow], numbers: Sequence[int] | None = None) -> Batch:
        batch = collate(
            rows,
            pad_token_id=self.pad_token_id,
            prompt_tokens=self.prompt_tokens,
            pad_to_multiple=_PADDED_TO * self.sequence_size,
            row_numbers=numbers,
        )
        return batch.share_of_tokens(self.sequence_rank, self.sequence_size)

    def _collated(self, rows: Sequence[AnyRow] | None) -> Batch | None:
        return None if rows is None else self._collate(rows)


def _lengths(rows: StoredRows | Sequence[AnyRow]) -> NDArray[np.int64]:
    if isinstance(rows, StoredRows):
        return rows.lengths()
    return np.array([len(row) for row in rows], dtype=np.int64)


def _endless(rows: StreamingRows, skip: int) -> Iterator[AnyRow]:
    """Yield a stream over and over, without its first `skip` rows; they may be several epochs."""
    while True:
        seen = 0
        for row in rows:
            seen += 1
            if seen > skip:
                yield row
        if not seen:
            raise DataError("the stream of training data holds no rows")
        skip = max(skip - seen, 0)
