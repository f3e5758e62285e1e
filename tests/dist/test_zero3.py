"""ZeRO-3 against replicas (bit for bit) and one process (to rounding), whatever routers decide."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from spawn import ROOT, run_worker

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]

BIAS = ["--compensation", "bias"]
LOW_RANK = ["--compensation", "low_rank", "--compensation_rank", "4"]
CASES: list[dict[str, Any]] = (
    [
        {
            "granularity": granularity,
            "execution": execution,
            "accumulate": accumulate,
            "packed": packed,
            "extra": [],
        }
        for granularity, execution, accumulate, packed in [
            ("attn_sequence", "dense", 1, False),
            ("attn_sequence", "sparse", 4, False),
            ("attn_sequence", "sparse", 1, True),
            ("attn_sequence", "dense", 4, True),
            ("attn_token", "dense", 1, False),
            ("attn_token", "sparse", 1, False),
            ("mlp_sequence", "sparse", 4, False),
            ("mlp_token", "dense", 1, True),
            ("mlp_token", "sparse", 1, False),
            ("block_sequence", "dense", 1, False),
            ("block_sequence", "sparse", 4, True),
            ("block_token", "dense", 4, False),
            ("block_token", "sparse", 1, False),
        ]
    ]
    + [
        {"granularity": "attn_sequence", "execution": "dense", "accumulate": 2, "packed": False}
        | {"extra": extra}
        for extra in (["--budget", "layer"], ["--activation_checkpointing"], ["--pool", "all"])
    ]
    + [
        {"granularity": granularity, "execution": execution, "accumulate": 2, "packed": packed}
        | {"extra": [*LOW_RANK, *extra]}
        for granularity, execution, packed, extra in [
            ("attn_sequence", "dense", False, ["--distill", "0.5"]),
            ("mlp_token", "sparse", True, []),
            ("block_token", "dense", False, ["--activation_checkpointing"]),
            ("attn_sequence", "dense", False, ["--budget", "static", "--distill", "0.5"]),
            ("mlp_token", "sparse", False, ["--freeze_routers", "--init_routers", "not read here"]),
        ]
    ]
    + [
        {"granularity": "mlp_token", "execution": "sparse", "accumulate": 2, "packed": False}
        | {"extra": ["--router_input", "first", "--activation_checkpointing"]}
    ]
    + [
        {"granularity": granularity, "execution": "sparse", "accumulate": 2, "packed": packed}
        | {"extra": maps}
        for granularity, packed, maps in [
            ("attn_token", False, BIAS),
            ("block_sequence", True, BIAS),
            ("mlp_sequence", False, LOW_RANK),
        ]
    ]
)


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


def as_work(case: dict[str, Any], ranks: int, *, sharded: bool) -> dict[str, Any]:
    """Return a worker's case; the global batch is the same however many ranks share it."""
    flags = ["--granularity", case["granularity"], "--train_execution", case["execution"]]
    flags += ["--capacity", "0.3", *case["extra"], *(ZERO3 if sharded else [])]
    return {
        "flags": flags,
        "packed": case["packed"],
        "parts": list(range(ranks * case["accumulate"])),
    }


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, tie_word_embeddings=request.param == "gemma2").save_pretrained(
        folder, max_shard_size="40KB"
    )
    return str(folder)


@pytest.mark.parametrize(("ranks", "cases"), [(2, CASES), (4, CASES[::3])])
def test_zero3_has_the_gradients_of_the_unsharded_model(
    model: str, ranks: int, cases: list[dict[str, Any]]
) -> None:
    sharded = [as_work(case, ranks, sharded=True) for case in cases]
    replicas = [as_work(case, ranks, sharded=False) for case in cases]
    results = run_worker("gradients", ranks, model=model, cases=sharded + replicas)
    alone = run_worker("gradients", 1, model=model, cases=replicas)[0]
    assert any(disagree(results[0][number], results[1][number]) for number in range(len(cases)))
    for number, case in enumerate(cases):
        for rank in range(ranks):
            mine, theirs = results[rank][number], results[rank][number + len(cases)]
            for name, gradient in mine["gradients"].items():
                assert torch.equal(gradient, theirs["gradients"][name]), (name_of(case), rank, name)
                assert float(gradient.abs().max()) > 0, (name_of(case), name)
            assert mine["loss_task"] == theirs["loss_task"], name_of(case)
            assert mine["loss_penalty"] == theirs["loss_penalty"], name_of(case)
            same_numbers(mine, alone[number], name_of(case))


def disagree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether some layer runs on one rank and not at all on the other."""
    return any(bool(one["kept"][k].any()) != bool(other["kept"][k].any()) for k in one["kept"])


def same_numbers(mine: dict[str, Any], truth: dict[str, Any], case: str) -> None:
    """Compare with the single process: to rounding, for sums are taken in another order."""
    assert mine["masked"] == 0, "padding is on the right, so attention needs no mask"
    assert mine["loss_task"] == pytest.approx(truth["loss_task"], rel=1e-6), case
    assert mine["loss_penalty"] == pytest.approx(truth["loss_penalty"], rel=1e-6), case
    assert mine["capacity_per_layer"] == pytest.approx(truth["capacity_per_layer"]), case
    for name, gradient in mine["gradients"].items():
        torch.testing.assert_close(
            gradient, truth["gradients"][name], rtol=1e-4, atol=1e-7, msg=f"{case}: {name}"
        )


def test_forced_divergence_runs_and_releases_every_weight(tmp_path: Path) -> None:
    """One rank skips every routed sublayer, the other none: the hardest case for collectives."""
    tiny_model("llama").save_pretrained(tmp_path)
    flags = {
        f"{target}_{unit}": ["--granularity", f"{target}_{unit}", "--train_execution", "sparse"]
        for target, unit in itertools.product(("attn", "mlp", "block"), ("sequence", "token"))
    }
    cases = [[*one, *sharding] for one in flags.values() for sharding in (ZERO3, [])]
    for results in run_worker("forced_divergence", 2, model=str(tmp_path), cases=cases):
        for granularity, mine, theirs in zip(flags, results[::2], results[1::2], strict=True):
            for name, gradient in mine["gradients"].items():
                assert torch.equal(gradient, theirs["gradients"][name]), (granularity, name)
            assert mine["gathered"] == 0, granularity


def test_no_weight_stays_gathered_inside_of_a_backward_pass(tmp_path: Path) -> None:
    """Also not after a checkpoint was recomputed whose input needs no gradient, that of the first
    routed layer: DeepSpeed 0.19.3 to 0.19.5 kept frozen weights there (its #8130, #8148). Nor by
    the product of a mixture's experts, which saves views of their weights."""
    tiny_model("llama", num_hidden_layers=10).save_pretrained(tmp_path)
    tiny_model("mixtral", num_hidden_layers=10).save_pretrained(tmp_path / "mixture")
    small = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": small}))
    flags = ["--ds_config", str(tmp_path / "ds.json"), "--layers", "2-9"]
    checkpointed, sparse = ["--activation_checkpointing"], ["--train_execution", "sparse"]
    mixture = [*flags, "--model", str(tmp_path / "mixture")]
    cases = [flags, [*flags, *checkpointed], [*flags, *checkpointed, *sparse]]
    cases += [mixture, [*mixture, "--granularity", "expert_token"], [*mixture, *checkpointed]]
    for results in run_worker("gathered_in_a_step", 2, model=str(tmp_path), cases=cases):
        for case, most in zip(cases, results, strict=True):
            assert most["after"] == 0, case
            # A layer is used, another comes, one goes; eight would be there if none were let go.
            bound = 3 * most["layer"] + most["head"]
            assert 0 < most["backward"] <= bound, (case, most)


@pytest.mark.parametrize(
    ("file", "changes"),
    [("zero3_offload.json", {}), ("zero3_multinode.json", {"zero_hpz_partition_size": 2})],
)
def test_other_deepspeed_files_give_the_same_gradients(
    file: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """hpZ's secondary copy is sharded over 2 of the 4 ranks, as over the 8 of a node."""
    tiny_model("llama").save_pretrained(tmp_path)
    content = json.loads((ROOT / "ds_configs" / file).read_text())
    content["zero_optimization"].update(changes)
    content["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    (tmp_path / "ds.json").write_text(json.dumps(content))
    flags = ["--train_execution", "sparse", "--capacity", "0.3"]
    plain = {"flags": flags, "parts": list(range(8))}
    other = plain | {"flags": [*flags, "--ds_config", str(tmp_path / "ds.json")]}
    for mine, truth in run_worker("gradients", 4, model=str(tmp_path), cases=[other, plain]):
        for name, gradient in mine["gradients"].items():
            assert torch.equal(gradient, truth["gradients"][name]), name


def test_every_rank_loads_its_own_slice_of_the_stored_weights(model: str) -> None:
    stored = dict(tiny_from(model).named_parameters())
    cases = [ZERO3, [*ZERO3, "--dtype", "bfloat16"]]
    for found in run_worker("whole_weights", 2, model=model, cases=cases):
        for weights, dtype in zip(found, (torch.float32, torch.bfloat16), strict=True):
            assert weights.keys() == stored.keys()
            for name, weight in weights.items():
                assert torch.equal(weight, stored[name].to(dtype)), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_are_skipped_alike_under_zero3_in_stages_and_in_one_process(
    ranks: int, tmp_path: Path
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    stages = ["--ds_config", "ds_configs/pipeline.json", "--pipeline_stages", "2"]
    ways = {"zero3": ZERO3, "replicas": [], "stages": [*stages, "--pipeline_partition", "3"]}
    routed = ["--granularity", "expert_token", "--router", "affine", "--capacity", "0.3"]
    kinds = [[], ["--train_execution", "sparse", "--activation_checkpointing"]]
    cases = [
        {"flags": [*routed, *kind, *way], "parts": list(range(4)), "packed": bool(kind)}
        for way in ways.values()
        for kind in kinds
    ]
    results = run_worker("gradients", ranks, model=str(tmp_path), cases=cases)
    alone = run_worker("gradients", 1, model=str(tmp_path), cases=cases[2:4])[0]
    for rank, mine in enumerate(results):
        for number, truth in enumerate(alone):
            zero3, replicas, staged = mine[number::2]
            for name, gradient in zero3["gradients"].items():
                assert torch.equal(gradient, replicas["gradients"][name]), (rank, number, name)
                assert float(gradient.abs().max()) > 0, name
            same_numbers(zero3, truth, f"zero3, rank {rank}, case {number}")
            same_numbers(staged, truth, f"stages, rank {rank}, case {number}")
    assert 0 < alone[0]["capacity_per_layer"][0] < 1


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_bfloat16_weights_leave_rope_its_float32_frequencies(family: str, tmp_path: Path) -> None:
    """Of mixtral transformers loads the weights, of llama every rank its own."""
    tiny_model(family).save_pretrained(tmp_path)
    expected = dict(tiny_from(str(tmp_path)).named_buffers())
    (found,) = run_worker(
        "buffers", 1, model=str(tmp_path), cases=[[*ZERO3, "--dtype", "bfloat16"]]
    )
    assert any("inv_freq" in name for name in expected)
    for name, buffer in expected.items():
        assert torch.equal(found[0][name], buffer), name


def tiny_from(folder: str) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_models_whose_stored_names_differ_are_loaded_too(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    stored = dict(tiny_from(str(tmp_path)).named_parameters())
    ranks = run_worker("scattered_weights", 2, model=str(tmp_path), flags=ZERO3)
    for weights, _ in ranks:
        for name, weight in weights.items():
            assert torch.equal(weight, stored[name]), name
    # Of mixtral the first rank reads for all. One that fails says why, and none waits for it.
    (_, first), (_, other) = ranks
    assert re.match("MegaskipError: .*nowhere.*: cannot (load its|read the) weights", first), first
    assert other.startswith("RuntimeError"), other


def test_a_rank_holds_its_share_and_twelve_bytes_a_trained_parameter(tmp_path: Path) -> None:
    tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32).save_pretrained(
        tmp_path
    )
    small = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000}}'
    (tmp_path / "ds.json").write_text(small)
    flags = ["--ds_config", str(tmp_path / "ds.json")]
    whole = sum(p.nbytes for p in tiny_from(str(tmp_path)).parameters())
    for sizes in run_worker("engine_bytes", 4, model=str(tmp_path), flags=flags):
        assert sizes["backbone"] == pytest.approx(whole / 4, rel=0.06)
        assert sizes["trained"] + sizes["moments"] == 12 * 3 * 128
        assert sizes["gradients"] == 0
