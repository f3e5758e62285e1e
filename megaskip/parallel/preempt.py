"""Signals that ask a run to stop: one on any rank makes all ranks save and stop after the same
step."""

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What clusters send before they take a node away (Slurm's --signal: USR1), and Ctrl-C."""
_AGAIN = 3.0
"""Seconds after which another Ctrl-C ends the process at once. Before that it is the first one,
which launchers pass on to ranks that got it already."""


class Preemption:
    """Context that notes a signal instead of ending the process."""

    def __init__(self) -> None:
        self._noted = False
        self._interrupted = math.inf
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Return whether any rank was asked to stop. Collective."""
        noted = torch.tensor([int(self._noted)])
        dist.all_reduce(noted, dist.ReduceOp.MAX)
        return bool(noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        if number == signal.SIGINT:
            now = time.monotonic()
            if now - self._interrupted > _AGAIN:
                raise KeyboardInterrupt
            self._interrupted = min(self._interrupted, now)
