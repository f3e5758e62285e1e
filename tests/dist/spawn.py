"""Real ranks for tests: a process each, a free port, a hard timeout, errors that name the rank."""

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
ALIKE = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/dist")]),
}
"""Environment of every rank."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """Started ranks; `logs[r]` receives what rank r prints."""

    processes: list["Rank"]
    logs: list[Path]

    def wait(self, timeout: float) -> list[int]:
        """Return the exit statuses; raises with every rank's last lines when time runs out."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                running = [r for r, p in enumerate(self.processes) if p.poll() is None]
                self.kill()
                raise AssertionError(f"ranks {running} hang after {timeout} s\n{self.tails()}")
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def kill(self) -> None:
        """End all ranks at once."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    def text(self, rank: int) -> str:
        """Return what a rank printed."""
        return self.logs[rank].read_text(errors="replace")

    def tails(self, lines: int = 25) -> str:
        """Return the last lines of every rank."""
        texts = [(rank, self.text(rank).splitlines()[-lines:]) for rank in range(len(self.logs))]
        return "\n".join(f"--- rank {rank}\n" + "\n".join(text) for rank, text in texts)


def start(
    argv: Sequence[str],
    ranks: int,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    where: Path = ROOT,
) -> Ranks:
    """Start `ranks` processes that run the script `argv` in `where`, as torchrun would; output to
    `folder`.

    They are forks of a process that has imported what they need: that takes seconds, once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, logs = [], []
    for rank in range(ranks):
        place = {**ALIKE, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank{rank}.log"
        process = forkserver().Process(
            target=run_script,
            args=(list(argv), {**place, **(environment or {})}, log, where, sys.executable),
        )
        process.start()
        processes.append(Rank(process))
        logs.append(log)
    return Ranks(processes, logs)


@dataclass
class Rank:
    """A process, with what `Ranks` wants to know of it."""

    process: Any

    @property
    def pid(self) -> int:
        """Return its number."""
        return int(self.process.pid)

    @property
    def returncode(self) -> int | None:
        """Return the exit status, minus the signal that ended it; None while it runs."""
        return self.process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()


@functools.cache
def forkserver() -> Any:
    """Return the context whose processes are forks of one that has imported the workers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workers", "megaskip.training.job", "peft"])
    before = dict(os.environ)
    os.environ.update(ALIKE)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run_script(
    argv: list[str], environment: Mapping[str, str], log: Path, where: Path, python: str
) -> None:
    """Run a script in this process, a fork, as if `python` had been started with it."""
    sys.executable = python
    os.environ.update(environment)
    os.chdir(where)
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = argv
    if Path(argv[0]).name != "__main__.py":  # as Python does for a script
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")


def run_worker(name: str, ranks: int, *, timeout: float = 240, **arguments: Any) -> list[Any]:
    """Run `workers.<name>(**arguments)` on `ranks` ranks and return what each returned."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        started = start([str(Path(__file__).with_name("workers.py")), name, scratch], ranks, folder)
        statuses = started.wait(timeout)
        assert statuses == [0] * ranks, f"exit statuses {statuses}\n{started.tails()}"
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def train(
    folder: Path,
    *flags: str,
    ranks: int = 2,
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Run launch/train.py on `ranks` ranks to its end, whatever that is."""
    started = start(["launch/train.py", *flags], ranks, folder, environment)
    started.wait(timeout)
    return started
