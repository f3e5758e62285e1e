"""Weights & Biases, MLflow and trackio themselves, where they are installed (tests/lowest.sh): a
run that goes on after a checkpoint is one run in each of them."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

# Two steps, a checkpoint after the first, and the run goes on from there.
RUN = """
import sys
from pathlib import Path
import numpy as np
from megaskip.reporting.trackers import open_trackers

folder = Path(sys.argv[2]) / "run-001"
folder.mkdir()
for first in (0, 1):
    settings = {"router": {"capacity": 0.5}, "data": ["a", "b"]}
    (tracker,) = open_trackers([sys.argv[1]], folder, settings, first_step=first).values()
    for step in range(first + 1, 3):
        tracker.scalars(step, {"loss": 1.0 / step})
        tracker.histogram(step, "logits", np.arange(50.0))
        tracker.image(step, "which_layers", np.zeros((8, 8, 3), np.uint8))
    tracker.close()
"""


def record(name: str, folder: Path) -> str:
    """Record with the tracker in a process of its own; return the name that the run keeps."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; tests/lowest.sh has it")
    here = {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(folder), "TMPDIR": str(folder)}
    here |= {"TRACKIO_DIR": str(folder / "trackio"), "WANDB_SILENT": "true"}
    child = [sys.executable, "-c", RUN, name, str(folder)]
    (elsewhere := folder / "elsewhere").mkdir()
    done = subprocess.run(
        child,
        cwd=elsewhere,
        env={**os.environ, **here},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(elsewhere.iterdir()), "files in the folder that the command runs in"
    return str(json.loads((folder / "run-001/trackers.json").read_text())[name])


def query(database: Path, command: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(command).fetchall()


def test_wandb_writes_offline_runs_of_one_name(tmp_path: Path) -> None:
    name = record("wandb", tmp_path)
    runs = sorted((tmp_path / "run-001/wandb").glob("offline-run-*"))
    files = [path for run in runs for path in run.glob("*.wandb")]
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    assert all(path.stat().st_size > 1000 for path in files)
    assert any(path.name.startswith("which_layers") for path in runs[0].rglob("*.png"))


def test_mlflow_goes_on_with_its_run(tmp_path: Path) -> None:
    name, database = record("mlflow", tmp_path), tmp_path / "mlflow.db"
    assert query(database, "SELECT name, status FROM runs") == [("run-001", "FINISHED")]
    values = "SELECT DISTINCT step, value FROM metrics WHERE key = 'loss' ORDER BY step"
    assert query(database, values) == [(1, 1.0), (2, 0.5)]
    tags = dict(query(database, "SELECT key, value FROM tags"))
    assert tags["megaskip_run"] == name
    assert tags["config.router.capacity"] == "0.5"
    assert any(path.name == "which_layers.png" for path in tmp_path.rglob("*.png"))


def test_trackio_goes_on_with_its_run(tmp_path: Path) -> None:
    name = record("trackio", tmp_path)
    rows = query(tmp_path / "trackio/megaskip.db", "SELECT run_name, step, metrics FROM metrics")
    assert {row[0] for row in rows} == {name}
    losses = {step: json.loads(m)["loss"] for _, step, m in rows if "loss" in json.loads(m)}
    assert losses == {1: 1.0, 2: 0.5}
