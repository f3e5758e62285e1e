"""Evaluation does not depend on how many ranks there are, nor on where the weights are."""

from pathlib import Path
from typing import Any

import transformers
from routed_models import randomise
from spawn import run_worker, start

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.base import describe_folder
from megaskip.export.folder import export_folder

BASE = Path(__file__).parents[2] / "megaskip/demo/backbone"
ASKED = ["--tasks", "demo", "--limit", "11", "--num_fewshot", "1", "--apply_chat_template"]
SHARDED = ["--ds_config", "ds_configs/zero3.json"]
STAGES = ["--pipeline_stages", "2"]
FOUR_STAGES = ["--pipeline_stages", "4"]


def routed(root: Path, granularity: str) -> None:
    """Write the demo with routers that decide by what they read: a run and an exported folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    routers = attach_routers(model, RouterConfig(granularity=granularity))
    randomise(routers)
    save_routers(root / "run/routers", routers, base=describe_folder(BASE))
    export_folder(root / "run/routers", BASE, root / "exported")


def evaluations(ranks: int, cases: list[list[str]]) -> list[Any]:
    """Return the tasks of each case's report, with every document's answers and costs."""
    return run_worker("evaluations", ranks, cases=[[*case, *ASKED] for case in cases])[0]


def test_ranks_and_sharding_change_no_bit(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("attn_sequence", "block_token")}
    for name, folder in models.items():
        routed(folder, name)
    attention, block = ([str(models[name] / "exported")] for name in models)
    run = [str(models["attn_sequence"] / "run")]
    alone = evaluations(1, [attention, block])
    for report in alone:
        assert [len(task["records"]) for task in report.values()] == [11, 11, 11]
        assert 0 < report["demo_answers"]["skip_ratio"] < 1
    # Prompts (by hash), log-probabilities, texts, metrics and counts, of every document.
    two = evaluations(2, [attention, run, attention + SHARDED, block, block + SHARDED])
    assert two == [alone[0], alone[0], alone[0], alone[1], alone[1]]
    assert evaluations(2, [attention + STAGES, block + STAGES]) == alone
    four = evaluations(4, [attention, run + SHARDED, run + STAGES, block + FOUR_STAGES])
    assert four == [alone[0]] * 3 + [alone[1]]


def test_wrong_input_ends_every_rank_with_one_message(tmp_path: Path) -> None:
    argv = ["launch/evaluate.py", "--model", "demo", "--tasks", "local_copa"]
    argv += ["--output", str(tmp_path / "out.json")]
    done = start(argv, 2, tmp_path / "log")
    assert done.wait(120) == [2, 2], done.tails()
    for rank in range(2):
        assert done.text(rank).count("error: ") == 1, done.text(rank)
        assert "--data_dir DIR" in done.text(rank)
        assert "Traceback" not in done.text(rank)
