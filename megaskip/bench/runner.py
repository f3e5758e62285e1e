"""Runs the parts of a report in a process of their own, within a time, whatever becomes of them."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaskip.bench import worker
from megaskip.bench.parts import Part, least_seconds, needed_bytes
from megaskip.bench.records import DONE, FAILED, LEFT_OUT, Record, Records
from megaskip.bench.setup import Row, Speeds
from megaskip.errors import ConfigError
from megaskip.extras import MissingExtraError

_START_SECONDS = 120.0
"""That a process may take to import its libraries and find the device."""
_OVERRUN = 1.0
"""Multiple of the time until its first figures that a part may take beyond its own, and as many
seconds again as follow."""
_GRACE = 20.0
_REPORT_SECONDS = 5.0
"""For the report at the end."""
_UNKNOWN = Speeds(flops=1e12, bandwidth=1e11)
"""Before they are measured; nothing that is measured then depends on them."""
_USABLE = 0.95
"""Share of a device's memory that weights, caches and activations can have."""
_EXTRAS = {"peft": "bench", "deepspeed": "train"}


@dataclass(slots=True, kw_only=True)
class Runner:
    """Decides which parts are run, and writes a record for each of them."""

    device: str
    """GPU or CPU."""
    records: Records
    end: float
    """time.monotonic() at which everything has to be over."""
    on_record: Callable[[Record], object] = lambda record: None
    start_method: str = "spawn"
    """How processes come to be: spawned ones share nothing with this one."""
    _worker: "Worker | None" = None
    _machine: Row = field(default_factory=dict)

    def run(self, parts: Sequence[Part]) -> None:
        """Run all parts that fit and are not done yet; the first one measures the machine."""
        try:
            for part in parts:
                before = self.records.read(part.name)
                if before is not None and before.status == DONE and part.kind != "machine":
                    self.on_record(before)
                    continue
                record = self._record(part)
                if part.kind == "machine":
                    self._know_machine(before, record)
                self.records.write(record)
                self.on_record(record)
        finally:
            self._stop_worker()

    def _know_machine(self, before: Record | None, record: Record) -> None:
        """Take the speeds of this machine; raises ConfigError when earlier parts ran on another."""
        if not record.rows:
            return
        self._machine = record.rows[0]
        device = self._machine["device"]
        if before is not None and before.rows and before.rows[0]["device"] != device:
            raise ConfigError(
                f"--output {self.records.folder} has figures of {before.rows[0]['device']}, and "
                f"this is {device}; name another folder"
            )

    def _record(self, part: Part) -> Record:
        if reason := self._why_left_out(part):
            return Record(name=part.name, status=LEFT_OUT, reason=reason)
        begun = time.monotonic()
        try:
            rows, failure = self._run(part)
        except WorkerDied as death:
            rows, failure = death.rows, str(death)
        if failure:
            self._stop_worker()
        status = FAILED if failure else DONE
        seconds = round(time.monotonic() - begun, 1)
        return Record(name=part.name, status=status, seconds=seconds, reason=failure, rows=rows)

    def _why_left_out(self, part: Part) -> str:
        """Return why a part is not begun: its library, its memory or its time; "" if it is."""
        library = part.library
        if library and find_spec(library) is None:
            return str(MissingExtraError(library, _EXTRAS[library], "it"))
        if part.kind != "machine" and not self._machine:
            return "the machine's speed could not be measured"
        needed, there = needed_bytes(part, self._element), self._machine.get("memory_bytes", 0)
        if part.shape and needed > _USABLE * there:
            return f"needs about {needed / 2**30:.0f} GiB, the device has {there / 2**30:.0f}"
        least = least_seconds(part, self.device, self._speeds, self._element)
        if least > self._left:
            return f"needs {least:.0f} s or more, {max(self._left, 0):.0f} s were left"
        return ""

    def _run(self, part: Part) -> tuple[list[Row], str]:
        """Return the rows of a part and why it failed, "" if it did not."""
        if self._worker is None:
            self._worker = Worker(
                self.device,
                self.records.log,
                seconds=min(_START_SECONDS, self._left),
                start_method=self.start_method,
            )
        box = min(part.seconds, self._left)
        least = least_seconds(part, self.device, self._speeds, self._element)
        limit = min(box + _OVERRUN * least + _GRACE, self._left)
        rows, failure = self._worker.run(part, box, self._speeds, limit)
        if part.kind == "zero3":
            self._stop_worker()
        return rows, failure

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.stop()
        self._worker = None

    @property
    def _left(self) -> float:
        return self.end - _REPORT_SECONDS - time.monotonic()

    @property
    def _speeds(self) -> Speeds:
        if not self._machine:
            return _UNKNOWN
        return Speeds(flops=self._machine["flops"], bandwidth=self._machine["bandwidth"])

    @property
    def _element(self) -> int:
        """Return the bytes of a weight."""
        return 2 if self._machine.get("dtype") == "bfloat16" else 4


class WorkerDied(Exception):
    """The process of a part ended, or had to be ended; holds the rows that it had sent."""

    def __init__(self, message: str, rows: list[Row]) -> None:
        super().__init__(message)
        self.rows = rows


class Worker:
    """A process that runs parts."""

    def __init__(self, device: str, log: Path, *, seconds: float, start_method: str) -> None:
        """Start it, printing to `log`; raises WorkerDied when it is not ready within `seconds`."""
        context: Any = multiprocessing.get_context(start_method)
        self._connection, theirs = context.Pipe()
        # A daemon ends with this process, even where that is interrupted.
        self._process = context.Process(target=worker.work, args=(theirs, device, log), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(time.monotonic() + seconds, [])

    def run(self, part: Part, box: float, speeds: Speeds, limit: float) -> tuple[list[Row], str]:
        """Return the rows of a part, which begins no run after `box` seconds, and why it failed.

        Raises WorkerDied when it takes longer than `limit`, or the process ends.
        """
        end = time.monotonic() + limit
        rows: list[Row] = []
        try:
            self._connection.send((part, box, speeds))
        except OSError:
            raise self._death(rows) from None
        while True:
            word, content = self._receive(end, rows)
            if word == worker.ROWS:
                rows = content
            else:
                return rows, content or ""

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self, end: float, rows: list[Row]) -> tuple[str, Any]:
        try:
            if self._connection.poll(max(end - time.monotonic(), 0.0)):
                message: tuple[str, Any] = self._connection.recv()
                return message
        except (EOFError, ConnectionError):
            raise self._death(rows) from None
        self._process.kill()
        raise WorkerDied("it did not end in time, and was stopped", rows)

    def _death(self, rows: list[Row]) -> WorkerDied:
        self._process.join()
        status = self._process.exitcode
        hint = " (killed, perhaps by the system for its memory)" if status == -9 else ""
        return WorkerDied(f"its process ended with status {status}{hint}; see parts/log.txt", rows)
