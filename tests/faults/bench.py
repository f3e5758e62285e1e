"""What all faults share: the run that they are done to, the truth without a fault, and a result."""

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/unit"), str(ROOT / "tests/dist")]

import pytest  # noqa: E402
from spawn import Ranks, start  # noqa: E402

STEPS = 6
LIMIT = 60
"""Seconds after a fault in which every rank has to end."""
NOISE = {"tokens_per_second", "peak_memory_gib"}
_OF_A_THREAD = re.compile(
    r"Exception in thread .*\nTraceback .*\n(?: .*\n)*.*tensorboard.*\n(?: .*\n)*OSError: .*"
)
RESULTS = ("routers/routers.safetensors", "routers/router_config.json")
ENGINES: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "ZeRO-3": (2, ["--ds_config", "ds_configs/zero3.json"]),
    "stages": (2, ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"]),
}
"""Ranks and flags of each."""
PHASES = ("loading", "first step", "checkpoint write", "calibration", "report")
"""Of a run, in their order; exports are killed apart."""


@dataclass(frozen=True)
class Result:
    """One fault that was tried."""

    fault: str
    where: str
    outcome: str
    survived: bool


@dataclass
class Bench:
    """A scratch folder with data, and the uninterrupted run of each engine."""

    scratch: Path
    rng_seed: int
    truths: dict[str, Path] = field(default_factory=dict)
    spans: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds that each phase of an uninterrupted run took, by engine."""

    def __post_init__(self) -> None:
        rng = random.Random(0)
        words = ("king", "queen", "sword", "night")
        texts = [" ".join(rng.choices(words, k=rng.randint(2, 9))) for _ in range(80)]
        rows = ({"prompt": f"Repeat: {text}", "completion": text} for text in texts)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / "rows.jsonl").write_text(lines)

    def flags(self, engine: str, output_dir: Path, *more: str) -> list[str]:
        """Return the flags of the run that all faults are done to."""
        return [
            *("--data", str(self.scratch / "rows.jsonl"), "--output_dir", str(output_dir)),
            *("--cache_dir", str(self.scratch / "cache"), "--max_steps", str(STEPS)),
            *("--save_every", "2", "--micro_batch_size", "1", "--held_out", "4", "--lr", "1e-2"),
            *("--gradient_accumulation_steps", "4", "--calibration_rows", "16", "--no-progress"),
            *("--heartbeat_timeout", "5", "--dist_timeout", "40", *ENGINES[engine][1], *more),
        ]

    def new_log(self, name: str) -> Path:
        """Return a new folder for the logs of what is done to `name`."""
        return Path(tempfile.mkdtemp(prefix=f"log-{name}-", dir=self.scratch))

    def begin(
        self, engine: str, folder: Path, *more: str, script: str = "launch/train.py"
    ) -> Ranks:
        """Start the run in `folder`."""
        log = self.new_log(folder.name)
        return start([script, *self.flags(engine, folder, *more)], ENGINES[engine][0], log)

    def truth(self, engine: str) -> Path:
        """Return the folder of the uninterrupted run, which is made once and timed."""
        if engine not in self.truths:
            folder = self.scratch / f"truth-{engine.replace(' ', '-')}"
            ranks = self.begin(engine, folder)
            moments = [time.monotonic()]
            for phase in PHASES:
                wait_until(lambda p=phase: is_over(p, folder), ranks)  # type: ignore[misc]
                moments.append(time.monotonic())
            statuses = ranks.wait(LIMIT)
            assert not any(statuses), ranks.tails()
            pairs = zip(PHASES, moments, moments[1:], strict=False)
            self.spans[engine] = {phase: after - before for phase, before, after in pairs}
            self.truths[engine] = folder
        return self.truths[engine]

    def resumed(self, engine: str, folder: Path) -> str:
        """Continue the run in `folder` to its end; return what is not as in the uninterrupted one,
        or ""."""
        ranks = self.begin(engine, folder, "--resume", "auto")
        statuses = ranks.wait(180)
        if any(statuses):
            return f"the resumed run ends with {statuses}\n{ranks.tails()}"
        return self.difference(engine, folder)

    def difference(self, engine: str, folder: Path) -> str:
        """Return what of a finished run is not as in the uninterrupted one, bit for bit, or ""."""
        truth = self.truth(engine)
        if metrics(folder) != metrics(truth):
            return "other metrics than the uninterrupted run"
        for name in RESULTS:
            if (folder / name).read_bytes() != (truth / name).read_bytes():
                return f"another {name} than the uninterrupted run's"
        return ""


def is_over(phase: str, folder: Path) -> bool:
    """Return whether a phase of the run in `folder` has ended, by the files that it leaves."""
    if phase == "loading":
        return (folder / "run.json").is_file()
    if phase == "first step":
        return (folder / "metrics.jsonl").is_file() and bool(
            (folder / "metrics.jsonl").stat().st_size
        )
    if phase == "checkpoint write":
        return (folder / f"step_{STEPS:06d}/COMPLETE").is_file()
    if phase == "calibration":
        return (folder / "routers").is_dir()
    return (folder / "report.json").is_file()


def is_saving(folder: Path) -> bool:
    """Return whether a checkpoint is being written in a run folder."""
    return any(folder.glob(".step_*.tmp"))


def wait_until(condition: Callable[[], bool], ranks: Ranks, seconds: float = 150) -> None:
    """Wait for a condition, or until every rank has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and any(process.poll() is None for process in ranks.processes):
        assert time.monotonic() < deadline, f"nothing happens\n{ranks.tails()}"
        time.sleep(0.002)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the numbers of each step that do not depend on the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOISE} for line in lines]


def output_of(ranks: Ranks) -> str:
    """Return what all ranks have printed."""
    return "\n".join(ranks.text(rank) for rank in range(len(ranks.logs)))


def is_message(ranks: Ranks) -> bool:
    """Return whether a run has ended with messages for users and no traceback but that of a thread
    of TensorBoard's, which nobody can catch."""
    text = _OF_A_THREAD.sub("", output_of(ranks))
    return "error: " in text and "Traceback" not in text


def checked(fault: str, where: str, attempt: Callable[[], str]) -> Result:
    """Return the result of `attempt`, which returns the outcome; an AssertionError is a failure,
    and so is pytest's."""
    try:
        return Result(fault, where, attempt(), survived=True)
    except (AssertionError, pytest.fail.Exception) as error:
        return Result(fault, where, str(error), survived=False)


def fresh(bench: Bench, name: str) -> Path:
    """Return a folder of this name that does not exist."""
    folder = bench.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


Results = Iterator[Result]
