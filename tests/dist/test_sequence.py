"""Ranks that share the tokens of rows compute, decide and learn what one process does.

The model has a window, which is shorter than a row: its mask is over the tokens of all ranks.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from safetensors.torch import load_file
from spawn import run_worker

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]
SPARSE = ["--train_execution", "sparse"]
CASES = {
    "attention by row, ZeRO-3": ["--granularity", "attn_sequence", *ZERO3],
    "MLP by token": ["--granularity", "mlp_token", *SPARSE],
    "blocks by row": ["--granularity", "block_sequence", *SPARSE, "--activation_checkpointing"],
    # A rank whose tokens are all skipped takes part in the attention of the others.
    "blocks by token, ZeRO-3": [
        *("--granularity", "block_token", *SPARSE, *ZERO3, "--activation_checkpointing"),
        *("--compensation", "low_rank", "--compensation_rank", "4", "--distill", "0.5"),
    ],
}


def trainings(root: Path, *sharing: str) -> list[list[str]]:
    """Return the flags of a run that ends at step 2, and of one that goes on without `sharing`."""
    text = root / "text.txt"
    if not text.is_file():
        text.write_text(" ".join(f"the {n} kings of {n * 7 % 31} lands" for n in range(70)))
    flags = ["--data", str(text), "--cache_dir", str(root / "tokens"), "--seq_length", "32"]
    flags += ["--held_out", "3", "--lr", "1e-2", "--calibration_rows", "8", "--lora_rank", "2"]
    flags += ["--micro_batch_size", "1", "--gradient_accumulation_steps", "2"]
    flags += ["--compensation", "bias", "--no-tensorboard", "--no-progress", *SPARSE]
    flags += ["--log_every", "1", "--dtype", "float32"]
    folder = root / ("shared" if sharing else "alone")
    first = [*flags, "--max_steps", "2", "--output_dir", str(folder / "first"), "--noise", "0.5"]
    resume = ["--resume", str(folder / "first" / "step_000002")]
    second = [*flags, "--max_steps", "3", "--output_dir", str(folder / "second"), *resume]
    return [[*first, *sharing], second]


def result(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = report["held_out"] | {k: report[k] for k in ("calibrated_capacity", "tokens")}
    del numbers["capacity_per_layer"]
    for line in lines:
        names = ("loss_task", "loss_penalty", "grad_norm", "capacity")
        numbers |= {f"{name} of step {line['step']}": line[name] for name in names}
    return numbers


def test_ranks_that_share_rows_learn_what_one_process_learns(tmp_path: Path) -> None:
    tiny_model("mistral", sliding_window=8).save_pretrained(tmp_path)
    sharing = ["--sequence_parallel_size", "2"]
    usual = ["--capacity", "0.3", "--max_grad_norm", "0"]
    cases = [[*flags, *usual] for flags in CASES.values()]
    shared = {"cases": [{"flags": [*case, *sharing], "parts": [0, 1]} for case in cases]}
    alone = {"cases": [{"flags": case, "parts": [0, 1]} for case in cases]}
    shared["runs"], alone["runs"] = trainings(tmp_path, *sharing), trainings(tmp_path)
    (truth,) = run_worker("shared_rows", 1, model=str(tmp_path), **alone)
    for results in run_worker("shared_rows", 2, model=str(tmp_path), **shared):
        for name, mine, theirs in zip(CASES, results, truth, strict=True):
            for number in ("loss_task", "loss_penalty", "capacity_per_layer"):
                assert mine[number] == pytest.approx(theirs[number], rel=1e-5, abs=1e-7), name
            for parameter, gradient in mine["gradients"].items():
                expected = theirs["gradients"][parameter]
                assert float(expected.abs().max()) > 0, (name, parameter)
                torch.testing.assert_close(
                    gradient, expected, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}"
                )
    for run in ("first", "second"):
        mine, theirs = (result(tmp_path / side / run) for side in ("shared", "alone"))
        assert mine == pytest.approx(theirs, rel=1e-4), run
    file = "second/routers/routers.safetensors"
    mine, theirs = (load_file(tmp_path / side / file) for side in ("shared", "alone"))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
