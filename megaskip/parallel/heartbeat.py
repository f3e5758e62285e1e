"""Heartbeats: every rank shows that it is alive, so that a dead one is named and not waited for.

They go over a store of their own, in a thread, and so work while a collective hangs.
"""

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from megaskip.errors import RankError
from megaskip.parallel.topology import Topology

_INTERVAL = 1.0
_EXIT_STATUS = 70
_SETTLE = 8.0
"""Seconds without a heartbeat after which a rank counts as dead once a collective has failed."""

RESUME = (
    "The run stops here; start it again with --resume auto to continue from the last checkpoint"
)


class HeartbeatMonitor:
    """Context in which every rank watches every other. Collective to enter, and to leave without an
    error.

    A rank without a heartbeat ends the process, with its name on stderr; one that made a collective
    fail is named in a RankError.
    """

    def __init__(self, topology: Topology, *, silence: int, advice: str = RESUME) -> None:
        """`silence` is how many seconds without a heartbeat count as death; `advice` ends the
        message about a lost rank."""
        self._advice = advice
        self._topology = topology
        self._silence = silence
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._names: dict[int, str] = {}
        self._store: dist.Store | None = None

    def __enter__(self) -> "HeartbeatMonitor":
        if self._topology.world_size == 1:
            return self
        default = dist.distributed_c10d._get_default_store()
        # torch's stubs lack it.
        self._store = dist.PrefixStore("megaskip_watch", default.clone())  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=self._silence))
        rank = self._topology.rank
        self._store.set(
            f"name/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        )
        self._store.set(f"beat/{rank}", "0")
        dist.barrier()
        for other in range(self._topology.world_size):
            self._names[other] = self._store.get(f"name/{other}").decode()
            self._seen[other] = (b"", time.monotonic())
        self._thread = threading.Thread(target=self._run, name="megaskip-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._store is None:
            return
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            lost = self._wait_for_silence()
            self._stop.set()
            if lost:
                raise RankError(
                    f"{lost}; this is rank {self._topology.rank}. {self._advice}"
                ) from None
            return
        if error is None:
            dist.barrier()  # a rank that is ready lives on while others still work
        self._stop.set()
        self._thread.join(timeout=2 * _INTERVAL)
        if error is None:
            # The store lives in rank 0: nobody leaves while others still look into it.
            dist.barrier()

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(_INTERVAL):
            count += 1
            lost = self._beat(count)
            if lost:
                print(
                    f"error: {lost}; this is rank {self._topology.rank}. {self._advice}",
                    file=sys.stderr,
                    flush=True,
                )
                # The main thread may sit in a collective that never returns; nothing gentler ends
                # it.
                os._exit(_EXIT_STATUS)

    def _beat(self, count: int) -> str | None:
        """Send heartbeat number `count`; return who has been silent for too long, or None."""
        assert self._store is not None
        try:
            self._store.set(f"beat/{self._topology.rank}", str(count))
            # In one request: one for each would be a million a second among a thousand ranks.
            beats = self._store.multi_get([f"beat/{other}" for other in self._names])
            for other, beat in zip(self._names, beats, strict=True):
                if beat != self._seen[other][0]:
                    self._seen[other] = (beat, time.monotonic())
        except (RuntimeError, ConnectionError):
            # The store lives in rank 0 (or its launcher).
            return f"{self._names[0]}, which keeps the ranks together, has gone"
        return self._silent_for(self._silence)

    def _silent_for(self, seconds: float) -> str | None:
        now = time.monotonic()
        silent = [name for rank, name in self._names.items() if now - self._seen[rank][1] > seconds]
        return f"{' and '.join(silent)} has not answered for {seconds:g} s" if silent else None

    def _wait_for_silence(self) -> str | None:
        """Return which rank is dead, once a collective has failed; None when all are alive."""
        deadline = time.monotonic() + _SETTLE + 3
        while time.monotonic() < deadline:
            lost = self._silent_for(_SETTLE)
            if lost or not self._thread.is_alive():
                return lost
            time.sleep(_INTERVAL / 2)
        return None
