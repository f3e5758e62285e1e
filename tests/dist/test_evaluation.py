"""Evaluation does not depend on how many ranks there are, nor on where the weights are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from routed_models import randomise
from spawn import start

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.export.folder import export_folder

BASE = Path(__file__).parents[2] / "megaskip/demo/backbone"
ASKED = ("--tasks", "demo", "--limit", "11", "--num_fewshot", "1", "--apply_chat_template")
SHARDED = ("--ds_config", "ds_configs/zero3.json")


def routed(root: Path, granularity: str) -> None:
    """Write the demo with routers that decide by what they read: a run and an exported folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    routers = attach_routers(model, RouterConfig(granularity=granularity))
    randomise(routers)
    save_routers(root / "run/routers", routers, base=describe_folder(BASE))
    export_folder(root / "run/routers", BASE, root / "exported")


def evaluated(folder: Path, ranks: int, model: Path, *flags: str) -> dict[str, Any]:
    """Return the tasks of the report, with every document's log-probabilities and texts."""
    folder.mkdir()
    out = folder / "out.json"
    argv = ["launch/evaluate.py", "--model", str(model), "--output", str(out), "--records", *ASKED]
    done = start([*argv, "--dtype", "float32", *flags], ranks, folder / "log")
    assert done.wait(180) == [0] * ranks, done.tails()
    content: dict[str, Any] = json.loads(out.read_text())
    assert [len(task["records"]) for task in content["tasks"].values()] == [11, 11, 11]
    return content["tasks"]


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_ranks_and_sharding_change_no_bit(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    routed(tmp_path, granularity)
    alone = evaluated(tmp_path / "alone", 1, tmp_path / "exported")
    assert 0 < alone["demo_answers"]["skip_ratio"] < 1
    cases: dict[str, tuple[int, str, tuple[str, ...]]] = {
        "zero3": (2, "exported", SHARDED),
        "two": (2, "run", ()),
    }
    if granularity == "attn_sequence":
        cases |= {"four": (4, "exported", ()), "zero3_run": (4, "run", SHARDED)}
    for name, (ranks, model, flags) in cases.items():
        # Prompts (by hash), log-probabilities, texts, metrics and counts, of every document.
        assert evaluated(tmp_path / name, ranks, tmp_path / model, *flags) == alone, name


def test_wrong_input_ends_every_rank_with_one_message(tmp_path: Path) -> None:
    argv = ["launch/evaluate.py", "--model", "demo", "--tasks", "local_copa"]
    argv += ["--output", str(tmp_path / "out.json")]
    done = start(argv, 2, tmp_path / "log")
    assert done.wait(120) == [2, 2], done.tails()
    for rank in range(2):
        assert done.text(rank).count("error: ") == 1, done.text(rank)
        assert "--data_dir DIR" in done.text(rank)
        assert "Traceback" not in done.text(rank)
