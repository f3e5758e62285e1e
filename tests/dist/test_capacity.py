"""The asked capacity is hit, whatever it is, with one row a step."""

import json
from pathlib import Path

import pytest
from spawn import start


def test_asked_capacity_is_realised_at_micro_batch_1(tmp_path: Path) -> None:
    runs = {capacity: tmp_path / str(capacity) for capacity in (0.25, 0.5, 0.75)}
    flags = ["--micro_batch_size", "1", "--max_steps", "120", "--dtype", "float32"]
    flags += ["--calibration_rows", "512"]
    started = []
    for capacity, run in runs.items():
        argv = ["launch/train.py", *flags, "--capacity", str(capacity), "--output_dir", str(run)]
        started.append(start(argv, 1, tmp_path / f"log{capacity}"))
    for one in started:
        assert one.wait(240) == [0], one.tails()
    for capacity, run in runs.items():
        report = json.loads((run / "report.json").read_text())
        assert report["calibrated_capacity"] == pytest.approx(capacity, abs=0.01)
        held_out = report["held_out"]
        sampling = 3 * held_out["capacity_standard_error"]
        assert held_out["capacity"] == pytest.approx(capacity, abs=0.01 + sampling)
