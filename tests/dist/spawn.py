"""Real ranks for tests: one process each, a free port, a hard timeout, and errors that name the rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """Started ranks; `logs[r]` receives what rank r prints."""

    processes: list[subprocess.Popen[bytes]]
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
                process.send_signal(signal.SIGKILL)
                process.wait()

    def text(self, rank: int) -> str:
        """Return what a rank printed."""
        return self.logs[rank].read_text(errors="replace")

    def tails(self, lines: int = 25) -> str:
        """Return the last lines of every rank."""
        texts = [(rank, self.text(rank).splitlines()[-lines:]) for rank in range(len(self.logs))]
        return "\n".join(f"--- rank {rank}\n" + "\n".join(text) for rank, text in texts)


def start(
    argv: Sequence[str], ranks: int, folder: Path, environment: Mapping[str, str] | None = None
) -> Ranks:
    """Start `ranks` Python processes with `argv`, as torchrun would; their output goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes, logs = [], []
    for rank in range(ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        log = folder / f"rank{rank}.log"
        with open(log, "wb") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *argv],
                    env={**os.environ, **place, **(environment or {})},
                    cwd=ROOT,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        logs.append(log)
    return Ranks(processes, logs)


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
