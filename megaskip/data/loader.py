"""The micro-batches of each step for one rank: a pure function of the step for stored data, a
stream otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from megaskip.data.collate import Batch, collate
from megaskip.data.dataset import TokenizedData
from megaskip.data.row import AnyRow
from megaskip.data.sampler import GlobalBatchOrder, shard
from megaskip.data.streaming import StreamingRows
from megaskip.errors import DataError

_FORWARD_ONLY = 4
"""Times the micro-batch size that a forward pass alone takes: it keeps no activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataLoader:
    """This rank's share of the global batches."""

    data: TokenizedData
    rank: int
    world_size: int
    micro_batch_size: int
    global_batch_size: int
    seed: int
    pad_token_id: int
    prompt_tokens: int

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of step `first`, `first` + 1, ... without end."""
        if isinstance(self.data.train, StreamingRows):
            yield from self._stream(self.data.train, first)
            return
        rows = self.data.train
        order = GlobalBatchOrder(len(rows), self.global_batch_size, self.seed)
        step = first
        while True:
            yield [
                self._collate([rows[i] for i in micro_batch])
                for micro_batch in self._shard(order.indices(step))
            ]
            step += 1

    def held_out(self) -> list[Batch | None]:
        """Return this rank's held-out batches, for forward passes only."""
        rows = self.data.held_out
        return self._spread([rows[i] for i in range(len(rows))])

    def calibration(self, count: int) -> list[Batch | None]:
        """Return this rank's share of `count` training rows, for forward passes only."""
        if isinstance(self.data.train, StreamingRows):
            return self._spread(list(islice(_endless(self.data.train, 0), count)))
        rows = self.data.train
        count = min(count, len(rows))
        order = GlobalBatchOrder(len(rows), count, self.seed)
        return self._spread([rows[i] for i in order.indices(0)])

    def _spread(self, rows: Sequence[AnyRow]) -> list[Batch | None]:
        """Return this rank's batches: the same number on every rank, None where its rows are used
        up."""
        size = _FORWARD_ONLY * self.micro_batch_size
        mine = rows[self.rank :: self.world_size]
        batches: list[Batch | None] = [
            self._collate(mine[i : i + size]) for i in range(0, len(mine), size)
        ]
        longest_share = -(-len(rows) // self.world_size)
        return batches + [None] * (-(-longest_share // size) - len(batches))

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

    def _collate(self, rows: Sequence[AnyRow]) -> Batch:
        return collate(rows, pad_token_id=self.pad_token_id, prompt_tokens=self.prompt_tokens)


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
