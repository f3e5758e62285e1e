"""megaskip drop: from a model to a folder without some of its layers, in jobs that go on where they
stood."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from spawn import ROOT

pytestmark = pytest.mark.usefixtures("warm_python")

FLAGS = ["--model", "demo", "--data", "demo", "--drop", "25", "--compensation_rank", "8"]
FLAGS += ["--rows", "32", "--order_rows", "16", "--held_out", "16", "--seq_length", "64"]
FLAGS += ["--dtype", "float32", "--steps", "2", "--batch_size", "8", "--lora_rank", "2"]


def drop(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, with one thread a rank."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megaskip", "drop", *FLAGS, "--output", "smaller", *flags]
        + ["--cache_dir", str(folder / "cache")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.timeout(600)
def test_a_model_becomes_a_smaller_one_on_two_ranks(tmp_path: Path) -> None:
    first = drop(tmp_path, "--nproc", "2")
    assert first.returncode == 0, first.stderr[-3000:]
    config = json.loads((tmp_path / "smaller/config.json").read_text())
    fitted = json.loads((tmp_path / "smaller.work/fitted/fit.json").read_text())
    assert sorted(config["dropped"]["attn"]) == sorted(fitted["order"])
    assert len(fitted["order"]) == 2  # of eight
    assert "verified" in first.stdout
    assert "LoRA of rank 2" in first.stdout.split("merged into the rest")[1]
    learnt = load_file(tmp_path / "smaller.work/run/routers/adapter/adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in learnt.items() if "lora_B" in name)
    report = json.loads((tmp_path / "smaller.work/run/report.json").read_text())
    assert report["held_out"]["capacity"] == 0.0
    # Started again with another output: nothing is fitted or trained a second time.
    (tmp_path / "smaller").rename(tmp_path / "kept")
    again = drop(tmp_path, "--nproc", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    commands = [line for line in again.stdout.splitlines() if "-m megaskip" in line]
    assert [line.split(" -m megaskip ")[1].split()[0] for line in commands] == ["export-static"]


def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = drop(tmp_path, "--batch_size", "7", "--compensation", "none", "--lora_rank", "0")
    assert refused.returncode == 2
    assert "--batch_size 7 cannot be split into micro-batches of 4 rows" in refused.stderr
    assert "--compensation none has nothing to train" in refused.stderr
    assert not (tmp_path / "smaller.work").exists()
