"""Ranks share the states in front of the first routed layer, and train as if they computed them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spawn import run_worker

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]


def result(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [[line[k] for k in ("loss_task", "grad_norm", "capacity")] for line in lines]
    held_out = json.loads((folder / "report.json").read_text())["held_out"]
    return [numbers, held_out], load_file(folder / "routers" / "routers.safetensors")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_states_and_learn_what_they_learn_without_them(
    ranks: int, tmp_path: Path
) -> None:
    """Rows of one length, for attention rounds by the length of a batch."""
    text, states = tmp_path / "text.txt", tmp_path / "states"
    text.write_text(" ".join(f"the {n} kings of {n * 7 % 31} lands" for n in range(70)))
    settings = ["--data", str(text), "--cache_dir", str(tmp_path / "tokens")]
    settings += ["--seq_length", "32", "--max_steps", "8", "--micro_batch_size", str(4 // ranks)]
    settings += ["--held_out", "3", "--lr", "1e-2", "--calibration_rows", "16", "--distill", "0.5"]
    settings += ["--activation_checkpointing", "--no-tensorboard", "--no-progress"]
    cached = ["--cache_prefix", str(states)]
    cases = {"plain": ZERO3, "filled": [*ZERO3, *cached], "read": cached}
    flags = [[*settings, *case, "--output_dir", str(tmp_path / n)] for n, case in cases.items()]
    times = run_worker("trainings", ranks, cases=flags, watched=str(states), timeout=90)[0]
    plain, filled, read = (result(tmp_path / name) for name in cases)
    for numbers, routers in (filled, read):
        assert numbers == plain[0]
        assert all(torch.equal(routers[name], value) for name, value in plain[1].items())
    assert times[0] == [] and times[1] == times[2], "the second run computes no states"
    (checksums,) = states.glob("*/checksums.bin")
    rows = np.fromfile(checksums, dtype=np.uint32)
    assert rows.all() and 16 < len(rows) < 32, "so that eight steps of four rows read some twice"
