"""--cache_prefix: where the states of a run's rows are kept, and the pass that computes those that
are not there."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import filelock
import numpy as np
import torch
import torch.distributed as dist

from megaskip.arch.prefix import FrozenPrefix
from megaskip.arch.task_loss import TaskLoss
from megaskip.config import RunConfig
from megaskip.data.collate import placeholder_batch
from megaskip.data.loader import DataLoader
from megaskip.data.row_states import (
    RowStates,
    StatesInMemory,
    StatesOnDisk,
    bytes_of_rows,
    make_folder,
)
from megaskip.errors import ConfigError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_every_rank
from megaskip.parallel.cached_prefix import (
    CachedPrefix,
    compute_states,
    first_reads,
    sharing_ranks,
)
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import human_bytes
from megaskip.training.prefix_plan import (
    IN_MEMORY,
    Rows,
    describe_states,
    first_routed_layer,
    key_of,
    reads_of_run,
    require_room_for,
    stored_dtype,
)

logger = get_logger(__name__)

_WAIT = 5
"""Seconds between attempts to take the lock of a folder that another run is filling."""


class Progress(Protocol):
    """Draws a bar."""

    def __call__(self, batches: Sequence[Rows | None], desc: str, /) -> Iterable[Rows | None]:
        """Return micro-batches that show how far a pass over them is; `desc` stands beside."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCache:
    """The states of a run's rows in front of layer `first`."""

    config: RunConfig
    topology: Topology
    first: int
    dtype: torch.dtype
    """Of the model's hidden states."""
    states: RowStates
    total_steps: int

    def fill(
        self,
        engine: Engine,
        loader: DataLoader,
        first_step: int,
        *,
        progress: Progress,
        check: Callable[[], object],
    ) -> None:
        """Compute the states that are not there, of all rows that the run reads from `first_step`
        on; from then on `engine` reads them, and the layers in front are gone. Collective.

        `progress` returns rows that show how far a pass over them is, `check` is as in
        Engine.forwards.
        """
        assert isinstance(engine.module, TaskLoss), "stages have no cached prefix"
        assert engine.routers.lowest_learning_layer == self.first, "layers in front are frozen"
        prefix = FrozenPrefix(engine.module, self.first)
        with engine.routers.disabled():  # routers that skip everything would hide a difference
            prefix.verify(self.dtype)
        with self._locked(check):
            rows = self._rows_to_compute(loader, first_step)
            compute_states(
                prefix,
                self.states,
                progress(rows, f"states in front of layer {self.first}"),
                loader.batch,
                placeholder_batch(self.topology.device),
                check=check,
            )
        dist.barrier()  # what others wrote is there for all
        logger.info("layers 0 to %d are left out from here on", self.first - 1)
        prefix.leave_out()
        engine.prefix = CachedPrefix(self.states, self.dtype)

    def _rows_to_compute(self, loader: DataLoader, first_step: int) -> list[Rows | None]:
        """Return the micro-batches that this rank computes, and None where others have more."""
        sharing = sharing_ranks(self.states)
        # Of all that share, one says what is there: the others may see it later.
        presents = gather_from_ranks(np.packbits(self.states.present()))
        present = np.unpackbits(presents[sharing[0]], count=len(loader.lengths())).astype(bool)
        reads = reads_of_run(self.config, loader, sharing, first_step, self.total_steps)
        mine = first_reads(reads, present, self.topology.rank)
        most = max(gather_from_ranks(len(mine)))
        return [*mine, *[None] * (most - len(mine))]

    @contextlib.contextmanager
    def _locked(self, check: Callable[[], object]) -> Iterator[None]:
        """Hold the lock of the cache's folder, on one of the ranks that share it.

        The system frees a lock when its holder dies. Ranks wait together: none sits in a collective
        for longer than a moment.
        """
        lock = None
        if isinstance(self.states, StatesOnDisk) and self._is_writer():
            folder = self.states.folder
            lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
        is_told = False
        while not all(gather_from_ranks(lock is None or _take(lock))):
            # All or none: two runs that share several folders would else wait for each other.
            if lock is not None:
                lock.release()
            if not is_told:
                logger.info("another run is filling this prefix cache; waiting for it")
                is_told = True
            check()
            time.sleep(_WAIT)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _is_writer(self) -> bool:
        return sharing_ranks(self.states)[0] == self.topology.rank


def open_prefix_cache(
    config: RunConfig,
    topology: Topology,
    source: ModelSource,
    loader: DataLoader,
    *,
    first_step: int,
    total_steps: int,
) -> PrefixCache:
    """Return the cache that --cache_prefix names, before the model is loaded. Collective.

    Raises ConfigError or DataError on all ranks when it cannot be used, or when there is no room
    for the states that are not there.
    """
    first = first_routed_layer(config, source)
    dtype, hidden_size = stored_dtype(config, source), source.text_config.hidden_size
    lengths = loader.lengths()
    kept = str(config.parallel.cache_prefix)
    if kept == IN_MEMORY and topology.world_size > 1:
        raise ConfigError(
            "--cache_prefix memory is for one process, because ranks read each other's rows; name "
            "a folder that they share, on a RAM disk (/dev/shm/NAME) if it is to be in memory"
        )

    def open_states() -> RowStates:
        if kept == IN_MEMORY:
            return StatesInMemory(len(lengths), hidden_size, dtype)
        description = describe_states(config, source, topology.device, loader.data.fingerprint)
        folder = Path(kept).expanduser() / key_of(description)
        make_folder(folder, lengths, hidden_size, dtype, description)
        return StatesOnDisk(folder, lengths, hidden_size, dtype)

    states = on_every_rank(topology, open_states)
    sharing = sharing_ranks(states)

    def require_room() -> None:
        present = states.present().copy()
        reads = reads_of_run(config, loader, sharing, first_step, total_steps)
        before = present.copy()
        first_reads(reads, present, topology.rank)
        needed = bytes_of_rows(lengths, present & ~before, hidden_size, dtype)
        logger.info(
            "prefix cache: %s in front of layer %d for %d rows that are not in %s, %d are",
            *(human_bytes(needed), first, int((present & ~before).sum())),
            *(kept, int(before.sum())),
        )
        require_room_for(needed, kept)

    on_every_rank(topology, require_room)
    return PrefixCache(
        config=config,
        topology=topology,
        first=first,
        dtype=source.dtype,
        states=states,
        total_steps=total_steps,
    )


def _take(lock: filelock.BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True
