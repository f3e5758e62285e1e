"""Stages against one process: losses, capacities and every router's gradient, for the same rows."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from spawn import run_worker

PARTS = 8
"""Micro-batches of a step, over all replicas."""
GRANULARITIES = [
    f"{t}_{u}" for t, u in itertools.product(("attn", "mlp", "block"), ("sequence", "token"))
]

CASES: dict[str, dict[str, Any]] = {
    **{name: {"flags": ["--granularity", name]} for name in GRANULARITIES},
    **{
        f"{name} packed sparse": {
            "flags": ["--granularity", name, "--train_execution", "sparse"],
            "packed": True,
        }
        for name in GRANULARITIES
    },
    "published budget": {"flags": ["--budget", "layer"]},
    "published budget, tokens": {"flags": ["--budget", "layer", "--granularity", "attn_token"]},
    "all pooled": {"flags": ["--pool", "all"]},
    "recomputed": {"flags": ["--activation_checkpointing"]},
    "recomputed, tokens": {
        "flags": ["--activation_checkpointing", "--granularity", "block_token"],
        "packed": True,
    },
    "compensated": {"flags": ["--compensation", "low_rank", "--compensation_rank", "4"]},
    "compensated, tokens, packed, recomputed": {
        "flags": ["--compensation", "bias", "--granularity", "block_token"]
        + ["--activation_checkpointing"],
        "packed": True,
    },
    "distilled": {"flags": ["--distill", "0.5"]},
    "static and distilled": {
        "flags": ["--compensation", "low_rank", "--budget", "static", "--distill", "0.7"]
    },
    "frozen routers, tokens": {
        "flags": ["--compensation", "low_rank", "--granularity", "mlp_token", "--freeze_routers"]
        + ["--init_routers", "not read here", "--distill", "0.5"]
    },
    "one micro-batch": {"flags": [], "parts": 1},
    "one micro-batch, recomputed": {"flags": ["--activation_checkpointing"], "parts": 1},
    "all routers on the last stage": {"flags": ["--layers", "5-5"]},
    "all routers on the first stage": {"flags": ["--layers", "1-1"], "cuts": ("3", "3,4,5")},
    "no router on the first stages": {"flags": ["--layers", "3-4"], "cuts": ("3", "1,2,5")},
    "no router in the middle": {"flags": ["--layers", "1,5"], "cuts": ("2", "2,3,5")},
}


def on_stages(case: dict[str, Any], stages: int, replicas: int) -> dict[str, Any]:
    """Return a worker's case; one process when `stages` is 1."""
    flags = ["--capacity", "0.3", *case["flags"]]
    if stages > 1:
        flags += ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", str(stages)]
        if "cuts" in case:
            flags += ["--pipeline_partition", case["cuts"][stages == 4]]
    parts = max(case.get("parts", PARTS), replicas)
    return {"flags": flags, "packed": case.get("packed", False), "parts": list(range(parts))}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, tie_word_embeddings=request.param == "gemma2").save_pretrained(
        folder, max_shard_size="40KB"
    )
    return str(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stages", "replicas", "every"), [(2, 1, 1), (4, 1, 3), (2, 2, 4)])
def test_stages_have_the_numbers_of_one_process(
    model: str, stages: int, replicas: int, every: int
) -> None:
    names = list(CASES)[::every]
    cases = [on_stages(CASES[name], stages, replicas) for name in names]
    alone = [on_stages(CASES[name], 1, replicas) for name in names]
    ranks = stages * replicas
    results = run_worker("gradients", ranks, model=model, cases=cases, timeout=500)
    truths = run_worker("gradients", 1, model=model, cases=alone)[0]
    for number, (name, truth) in enumerate(zip(names, truths, strict=True)):
        for rank in range(ranks):
            same_numbers(results[rank][number], truth, f"{name}, rank {rank}")
        hidden, keep = results[0][number]["bytes_sent"]
        assert hidden > 0, name


def same_numbers(mine: dict[str, Any], truth: dict[str, Any], what: str) -> None:
    assert mine["masked"] == 0, "padding is on the right, so attention needs no mask"
    for key in ("loss_task", "loss_penalty"):
        assert math.isfinite(truth[key])
        assert mine[key] == pytest.approx(truth[key], rel=1e-6), (what, key)
    assert mine["capacity_per_layer"] == pytest.approx(truth["capacity_per_layer"]), what
    for name, gradient in truth["gradients"].items():
        assert float(gradient.abs().max()) > 0, (what, name)
        torch.testing.assert_close(
            mine["gradients"][name], gradient, rtol=1e-5, atol=1e-7, msg=f"{what}: {name}"
        )


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the first of two stages found in each case, and one process in "carried"."""
    folder = tmp_path_factory.mktemp("two_stages")
    tiny_model("llama").save_pretrained(folder)
    strict = {"flags": ["--penalty_weight", "5"]}
    work = {
        "carried": on_stages(strict, 2, 1),
        "cut off": on_stages(strict, 2, 1) | {"cut_off_keep": True},
        "sequence": on_stages({"flags": [], "cuts": ("3", "")}, 2, 1),
        "token": on_stages({"flags": ["--granularity", "attn_token"], "cuts": ("3", "")}, 2, 1),
    }
    found = run_worker("gradients", 2, model=str(folder), cases=list(work.values()))[0]
    alone = run_worker("gradients", 1, model=str(folder), cases=[on_stages(strict, 1, 1)])[0]
    return dict(zip(work, found, strict=True)), alone[0]


def test_without_the_carried_masks_routers_do_not_feel_the_budget(
    two_stages: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """The comparison above can fail: it does when no gradient returns through the masks."""
    found, truth = two_stages
    same_numbers(found["carried"], truth, "carried")
    with pytest.raises(AssertionError, match="attn.weight"):
        same_numbers(found["cut off"], truth, "cut off")


def test_bytes_that_cross_a_boundary_are_states_and_masks(
    two_stages: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """Per micro-batch of 2 x 24: hidden states, and one float32 for each unit of layer 2."""
    found, _ = two_stages
    states = PARTS * 2 * 24 * 32 * 4
    assert found["sequence"]["bytes_sent"] == [states, PARTS * 2 * 1 * 4]
    assert found["token"]["bytes_sent"] == [states, PARTS * 2 * 24 * 4]


def test_evaluation_and_calibration_through_stages(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    cases = ["attn_sequence", "mlp_token", "block_token"]

    def flags(stages: int) -> list[list[str]]:
        pipeline = ["--pipeline_stages", str(stages)] if stages > 1 else []
        return [["--granularity", name, "--capacity", "0.4", *pipeline] for name in cases]

    truths = run_worker("held_out", 1, model=str(tmp_path), cases=flags(1))[0]
    for stages, ranks in ((3, 3), (2, 4)):
        results = run_worker("held_out", ranks, model=str(tmp_path), cases=flags(stages))
        for rank, number in itertools.product(range(ranks), range(len(cases))):
            mine, truth = results[rank][number], truths[number]
            if rank == 0:
                assert mine["scores"] == truth["scores"] == [2, 3, 4]
            for key in truth.keys() - {"scores"}:
                value = truth[key]
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (stages, rank, key)


def test_stages_that_learn_nothing_keep_nothing_for_later(tmp_path: Path) -> None:
    """The first stage has no router, the second no router below it: neither waits for a gradient
    of what came in, so more micro-batches take no more memory than their masks."""
    tiny_model("llama").save_pretrained(tmp_path)
    flags = ["--layers", "3-4", "--pipeline_stages", "2", "--pipeline_partition", "3"]
    for few, many in run_worker(
        "memory_of_steps", 2, model=str(tmp_path), flags=flags, counts=[2, 10]
    ):
        hidden_states = 2 * 24 * 32 * 4
        assert many - few < 2 * hidden_states, (few, many)
