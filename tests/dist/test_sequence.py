"""Ranks that share the tokens of rows compute, decide and learn what one process does.

The model has a window, which is shorter than a row: its mask is over the tokens of all ranks. Its
rope is scaled, and 4 ranks are more than its 2 key-value heads, which are repeated for them.
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
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
YARN["original_max_position_embeddings"] = 16  # shorter than a row
CASES: dict[str, tuple[str, str, list[str]]] = {
    "attention by row, two replicas, ZeRO-3": (
        *("mistral", "2"),
        ["--granularity", "attn_sequence", *ZERO3],
    ),
    "MLP by token, two replicas": ("mistral", "2", ["--granularity", "mlp_token", *SPARSE]),
    "blocks by row": (
        *("mistral", "4"),
        ["--granularity", "block_sequence", *SPARSE, "--activation_checkpointing"],
    ),
    # A rank whose tokens are all skipped takes part in the attention of the others.
    "blocks by token, ZeRO-3": (
        *("mistral", "4"),
        [
            *("--granularity", "block_token", *SPARSE, *ZERO3, "--activation_checkpointing"),
            *("--compensation", "low_rank", "--compensation_rank", "4", "--distill", "0.5"),
        ],
    ),
    "experts by token, ZeRO-3": ("mixtral", "4", ["--granularity", "expert_token", *ZERO3]),
}
"""By name: the family, the ranks that share a row, other flags."""


def cases(root: Path, *, shared: bool) -> list[dict[str, Any]]:
    """Return the cases of the worker `gradients`, on shared rows or on whole ones."""
    listed = []
    for family, size, flags in CASES.values():
        sharing = ["--sequence_parallel_size", size] if shared else []
        usual = ["--capacity", "0.3", "--max_grad_norm", "0"]
        case = {"model": str(root / family), "flags": [*flags, *usual, *sharing]}
        listed.append(case | {"parts": [0, 1]})
    return listed


def trainings(root: Path, *, shared: bool) -> list[list[str]]:
    """Return the flags of a run of three steps; of one that goes on from its second step without
    sharing; and, if they share rows, of one that goes on as it was."""
    text = root / "text.txt"
    if not text.is_file():
        text.write_text(" ".join(f"the {n} kings of {n * 7 % 31} lands" for n in range(70)))
    flags = ["--data", str(text), "--cache_dir", str(root / "tokens"), "--seq_length", "32"]
    flags += ["--held_out", "3", "--lr", "1e-2", "--calibration_rows", "8", "--lora_rank", "2"]
    flags += ["--micro_batch_size", "1", "--gradient_accumulation_steps", "4"]
    flags += ["--compensation", "bias", "--no-tensorboard", "--no-progress", *SPARSE]
    flags += ["--log_every", "1", "--dtype", "float32", "--max_steps", "3", "--save_every", "2"]
    folder = root / ("shared" if shared else "alone")
    # Each replica draws noise of its own, the ranks that share a row the same.
    sharing = ["--noise", "0.5", *(["--sequence_parallel_size", "4"] if shared else [])]
    resume = ["--resume", str(folder / "first" / "step_000002")]
    runs = {"first": sharing, "whole": resume, "again": [*sharing, *resume]}
    names = ("first", "whole", "again") if shared else ("first", "whole")
    return [[*flags, "--output_dir", str(folder / name), *runs[name]] for name in names]


def trained(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the numbers of a run, by name, and what it has learned."""
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = report["held_out"] | {k: report[k] for k in ("calibrated_capacity", "tokens")}
    del numbers["capacity_per_layer"]
    for line in lines:
        names = ("loss_task", "loss_penalty", "grad_norm", "capacity")
        numbers |= {f"{name} of step {line['step']}": line[name] for name in names}
    return numbers, load_file(folder / "routers" / "routers.safetensors")


def test_ranks_that_share_rows_learn_what_one_process_learns(tmp_path: Path) -> None:
    """A run that goes on with as many ranks a row has the bits of one that was not stopped, one
    that goes on without sharing its numbers."""
    tiny_model("mistral", sliding_window=8, rope_parameters=YARN).save_pretrained(
        tmp_path / "mistral"
    )
    tiny_model("mixtral").save_pretrained(tmp_path / "mixtral")
    shared, alone = (
        {"cases": cases(tmp_path, shared=sharing), "runs": trainings(tmp_path, shared=sharing)}
        for sharing in (True, False)
    )
    model = str(tmp_path / "mistral")
    (truth,) = run_worker("shared_rows", 1, model=model, **alone)
    for results in run_worker("shared_rows", 4, model=model, **shared):
        for name, mine, theirs in zip(CASES, results, truth, strict=True):
            for number in ("loss_task", "loss_penalty", "capacity_per_layer"):
                assert mine[number] == pytest.approx(theirs[number], rel=1e-5, abs=1e-7), name
            for parameter, gradient in mine["gradients"].items():
                expected = theirs["gradients"][parameter]
                assert float(expected.abs().max()) > 0, (name, parameter)
                torch.testing.assert_close(
                    gradient, expected, rtol=1e-4, atol=1e-6, msg=f"{name}: {parameter}"
                )
    for run in ("first", "whole"):
        mine, theirs = (trained(tmp_path / side / run) for side in ("shared", "alone"))
        assert mine[0] == pytest.approx(theirs[0], rel=1e-4), run
        for name, tensor in mine[1].items():
            torch.testing.assert_close(tensor, theirs[1][name], rtol=1e-3, atol=1e-5)
    (again, bits), (first, expected_bits) = (
        trained(tmp_path / "shared" / run) for run in ("again", "first")
    )
    assert again == {name: first[name] for name in again}
    assert all(torch.equal(bits[name], tensor) for name, tensor in expected_bits.items())
