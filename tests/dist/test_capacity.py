"""The asked capacity is hit, whatever it is, with one row a step."""

import json
from pathlib import Path

import pytest
from spawn import train


@pytest.mark.parametrize("capacity", [0.25, 0.5, 0.75])
def test_asked_capacity_is_realised_at_micro_batch_1(capacity: float, tmp_path: Path) -> None:
    done = train(
        tmp_path / "log",
        *("--capacity", str(capacity), "--micro_batch_size", "1", "--max_steps", "120"),
        *("--dtype", "float32", "--calibration_rows", "1024", "--output_dir", str(tmp_path / "run")),
        ranks=1,
    )
    assert done.processes[0].returncode == 0, done.tails()
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["calibrated_capacity"] == pytest.approx(capacity, abs=0.01)
    held_out = report["held_out"]
    sampling = 3 * held_out["capacity_standard_error"]
    assert held_out["capacity"] == pytest.approx(capacity, abs=0.01 + sampling)
