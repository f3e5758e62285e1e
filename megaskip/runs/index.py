"""The list of run folders: what each says of itself, finished or not. Reads files, loads nothing.

Knows the files of `megaskip train`, not how they come about.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.config.stored import stored_value
from megaskip.errors import ConfigError, MegaskipError
from megaskip.reporting.metrics import EVALUATIONS, FILE
from megaskip.reporting.summary import aligned, or_dash

_WINDOW = 20
"""Steps at the end over which speed and capacity are averaged, as in a run's own report."""
_HEADER = ("run", "begun", "model", "trains", "asked", "runs", "loss", "tokens/s", "state")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run folder. What it does not say, or not yet, is None."""

    folder: str
    begun: str | None = None
    """Local time at which run.json was written last, to the minute."""
    model: str | None = None
    trains: str | None = None
    """Granularity of the routers, or full."""
    asked_capacity: float | None = None
    capacity: float | None = None
    """Held out, of a run that has measured it; else of the last steps of training."""
    loss: float | None = None
    """Held out, of what was trained; of an unfinished run that of its last evaluation."""
    loss_dense: float | None = None
    tokens_per_second: float | None = None
    step: int | None = None
    state: str = "finished"
    """finished, stopped early, unfinished, or damaged and why."""


def find_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in `folder`, or the one that it is, oldest first; raises ConfigError where
    there is none."""
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder}: there is no such folder; give one that holds runs")
    folders = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir()))
    if not folders:
        raise ConfigError(
            f"--folder {folder}: no run in it (a folder with run.json, of `megaskip train`)"
        )
    return sorted((summarise(path) for path in folders), key=lambda run: run.begun or "")


def summarise(folder: Path) -> RunSummary:
    """Return what a run folder says of itself; what cannot be read is said in its state."""
    name = folder.name or str(folder)
    try:
        return _summary(folder, name)
    except (MegaskipError, OSError) as error:
        return RunSummary(folder=name, state=f"damaged: {error}")


def run_table(runs: Sequence[RunSummary]) -> list[str]:
    """Return the runs as aligned lines under a header."""
    return aligned([_HEADER, *map(_cells, runs)])


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("run.json", FILE))


def _summary(folder: Path, name: str) -> RunSummary:
    file = folder / "run.json"
    settings = read_json(file)

    def setting(path: str, kind: Any) -> Any:
        return stored_value(settings, f"config.{path}", kind, "run.json")

    begun = datetime.datetime.fromtimestamp(file.stat().st_mtime)
    is_full = setting("model.train", str) == "full"
    run = RunSummary(
        folder=name,
        begun=begun.isoformat(sep=" ", timespec="minutes"),
        model=setting("model.model", str),
        trains="full" if is_full else setting("router.granularity", str),
        asked_capacity=None if is_full else setting("router.capacity", float),
        **_training(folder, is_full),
    )
    if (folder / "report.json").is_file():
        return dataclasses.replace(run, **_ending(folder))
    return dataclasses.replace(run, state="unfinished", **_last_evaluation(folder))


def _training(folder: Path, is_full: bool) -> dict[str, Any]:
    """Return what the last steps were like."""
    last = _records(folder / FILE)[-_WINDOW:]
    if not last:
        return {"step": 0}
    speed = _mean(last, "tokens_per_second")
    capacity = None if is_full else _mean(last, "capacity")
    return {"step": int(last[-1]["step"]), "tokens_per_second": speed, "capacity": capacity}


def _ending(folder: Path) -> dict[str, Any]:
    """Return what the report of a finished run says."""
    report = read_json(folder / "report.json")
    ending = report.get("early_stop")
    is_early = isinstance(ending, Mapping) and bool(ending.get("stopped"))
    held_out = stored_value(report, "held_out", dict, "report.json")
    return {
        "step": stored_value(report, "steps", int, "report.json"),
        **_losses(held_out, "report.json"),
        "state": "stopped early" if is_early else "finished",
    }


def _last_evaluation(folder: Path) -> dict[str, Any]:
    evaluations = _records(folder / EVALUATIONS)
    return _losses(evaluations[-1], EVALUATIONS) if evaluations else {}


def _losses(numbers: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return loss and capacity of held-out numbers; empty where there are none."""
    names = {"loss": "loss", "loss_routed": "loss", "loss_dense": "loss_dense"}
    names["capacity"] = "capacity"
    return {
        field: float(stored_value(numbers, name, float, source))
        for name, field in names.items()
        if name in numbers
    }


def _records(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines; a line that was cut off is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    numbers = [r[name] for r in records if isinstance(r.get(name), (int, float))]
    return sum(numbers) / len(numbers) if numbers else None


def _cells(run: RunSummary) -> tuple[str, ...]:
    loss = or_dash(run.loss, ".4f")
    if run.loss is not None and run.loss_dense is not None:
        loss += f" ({run.loss - run.loss_dense:+.4f})"
    state = f"{run.state}, step {run.step}" if run.step is not None else run.state
    return (
        run.folder,
        run.begun or "-",
        Path(run.model).name if run.model else "-",
        run.trains or "-",
        or_dash(run.asked_capacity, ".3f"),
        or_dash(run.capacity, ".3f"),
        loss,
        or_dash(run.tokens_per_second, ".0f"),
        state,
    )
