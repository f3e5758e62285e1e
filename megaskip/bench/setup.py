"""What every part of a report is told, and what it gives back."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megaskip.bench.timing import Limits, Stopwatch

Row = dict[str, Any]
"""One line of a table: values as JSON has them; `table` says of which."""
Snapshots = Iterator[list[Row]]
"""All rows of a part, again and again: the last are those that count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the device can do at the most; measured."""

    flops: float
    """FLOP/s of a large matrix product in the weights' type."""
    bandwidth: float
    """Bytes a second, read and written, of a large copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where a part runs, how fast that is, and for how long."""

    device: torch.device
    dtype: torch.dtype
    speeds: Speeds
    until: float
    """time.monotonic() after which no new run is begun."""

    @property
    def counts_cpu_time(self) -> bool:
        """Return whether times are what the CPU spends on this process: on one thread, where that
        is what passes on an idle machine, and others do not disturb it on a shared one."""
        return self.device.type == "cpu" and torch.get_num_threads() == 1

    @property
    def watch(self) -> Stopwatch:
        """Return a clock that waits for the device."""
        clock = time.process_time if self.counts_cpu_time else time.perf_counter
        return Stopwatch(self.device, clock)

    def limits(self, turns: int, *, share: float = 1.0) -> Limits:
        """Return limits of so many turns, and of a share of the time that is left."""
        now = time.monotonic()
        return Limits(turns=turns, until=now + share * (self.until - now))
