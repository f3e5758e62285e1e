"""What --dry_run says a rank will need is what a rank needs."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config, tiny_model
from spawn import run_worker

from megaskip.config import parse_run_config
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.estimate import Estimate, estimate
from megaskip.parallel.estimate_stages import estimate_stages
from megaskip.parallel.loading.source import resolve_source
from megaskip.training import dry_run

ZERO3 = ["--ds_config", "ds_configs/zero3.json"]
BATCH = ["--micro_batch_size", "4", "--seq_length", "128"]
CASES = [
    [*BATCH, *ZERO3],
    BATCH,
    [*BATCH, *ZERO3, "--activation_checkpointing"],
    [*BATCH, *ZERO3, "--granularity", "mlp_token", "--loss_chunk_tokens", "64"],
    ["--micro_batch_size", "1", "--seq_length", "64", *ZERO3, "--granularity", "block_sequence"],
    [*BATCH, *ZERO3, "--dtype", "bfloat16"],
    [*BATCH, *ZERO3, "--lora_rank", "16"],
]
SHORT = ["--micro_batch_size", "1", "--seq_length", "64", "--activation_checkpointing", *ZERO3]
"""Flags of a step whose largest share is what is gathered."""
NF4 = [[*BATCH, "--base_dtype", "nf4"]] if find_spec("bitsandbytes") else []
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_hidden_layers": 8,
    "vocab_size": 4096,
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_estimate_is_within_15_percent_of_what_is_measured(ranks: int, tmp_path: Path) -> None:
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    sharing = [*BATCH, "--sequence_parallel_size", "2", "--activation_checkpointing"]
    mixture = ["--model", mixture_in(tmp_path / "mixture"), "--granularity", "expert_token"]
    cases = [*CASES, sharing, SHORT, [*mixture, *SHORT], [*mixture, *BATCH, *ZERO3]]
    cases += [[*mixture, *SHORT, "--ds_config", nothing_ahead(tmp_path / "ds.json")]]
    cases = cases if ranks == 2 else [*CASES, *NF4]
    found = run_worker("memory_of_a_step", ranks, model=str(tmp_path), cases=cases)
    for number, flags in enumerate(cases):
        config = parse_run_config(["--model", str(tmp_path), *flags])
        ds_content = read_ds_config(config.parallel.ds_config, config)
        source = resolve_source(config.model)
        planned = estimate(config, source, world_size=ranks, ds_content=ds_content)
        for rank in range(ranks):
            measured = found[rank][number]
            assert planned.total == pytest.approx(measured["total"], rel=0.15), (flags, planned)
            assert planned.trained == pytest.approx(measured["trained"], rel=0.15), (flags, planned)


def test_estimate_of_each_stage_is_within_15_percent(tmp_path: Path) -> None:
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    stages = ["--pipeline_stages", "2", "--ds_config", "ds_configs/pipeline.json"]
    stages += ["--gradient_accumulation_steps", "4"]
    cases = [
        [*BATCH, *stages, *extra]
        for extra in (["--lora_rank", "16"], ["--activation_checkpointing"])
    ]
    cases += [[*flags, *stages] for flags in NF4]
    mixture = ["--model", mixture_in(tmp_path / "mixture"), "--granularity", "expert_token"]
    cases += [[*BATCH, *mixture, *stages]]
    found = run_worker("memory_of_a_step", 2, model=str(tmp_path), cases=cases)
    for number, flags in enumerate(cases):
        config = parse_run_config(["--model", str(tmp_path), *flags])
        for stage, plan in enumerate(estimate_stages(config, resolve_source(config.model))):
            measured = found[stage][number]
            assert plan.total == pytest.approx(measured["total"], rel=0.15), (flags, stage, plan)
            assert plan.trained == pytest.approx(measured["trained"], rel=0.15), (flags, stage)


def nothing_ahead(path: Path) -> str:
    """Write the settings of a ZeRO-3 that fetches no weights ahead."""
    content = json.loads(Path("ds_configs/zero3.json").read_text())
    content["zero_optimization"]["stage3_prefetch_bucket_size"] = 0
    path.write_text(json.dumps(content))
    return str(path)


def mixture_in(folder: Path) -> str:
    """Write a mixture of experts of four layers; return its folder."""
    tiny_model("mixtral", **SHAPE | {"num_hidden_layers": 4}).save_pretrained(folder)
    return str(folder)


def write_70b(folder: Path) -> list[str]:
    """Write the config of a 70B model; return flags that plan it on ZeRO-3."""
    shape = {
        **tiny_config("llama").to_dict(),
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shape))
    flags = ["--seq_length", "4096", "--micro_batch_size", "1", "--activation_checkpointing"]
    return ["--model", str(folder), *flags, *ZERO3]


def test_rows_that_are_not_packed_are_planned_without_a_mask(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokens, live = 2048, []
    for packing in ([], ["--packing"]):
        flags = ["--seq_length", str(tokens), "--micro_batch_size", "1", *packing]
        config = parse_run_config(["--model", str(tmp_path), *flags])
        plan = estimate(config, resolve_source(config.model), world_size=1, ds_content={})
        live.append(plan.activations + plan.workspace)
    assert live[1] - live[0] > tokens**2


def test_70b_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    config = parse_run_config(write_70b(tmp_path))
    ds_content = read_ds_config(config.parallel.ds_config, config)
    planned = estimate(config, resolve_source(config.model), world_size=16, ds_content=ds_content)
    assert planned.parameters == 70_553_706_496
    assert planned.weights == pytest.approx(2 * planned.parameters / 16, rel=0.01)
    assert planned.trained == 40 * 8192 * 16
    assert len(planned.trainable) == 40


@pytest.mark.parametrize(("budget", "trained"), [("global", 42_598_400), ("static", 42_270_720)])
def test_the_compensations_of_70b_are_planned(
    budget: str, trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whose moments are shared out."""
    plans = []

    def planned(*arguments: Any, **options: Any) -> Estimate:
        plans.append(estimate(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr(dry_run, "estimate", planned)
    flags = ["--compensation", "low_rank", "--budget", budget, "--max_steps", "10"]
    config = parse_run_config([*write_70b(tmp_path), *flags])
    source = resolve_source(config.model)
    said = " ".join(" ".join(dry_run.dry_run_lines(config, source, 16)).split())
    assert "low_rank of rank 64 in 40 layers: 42,270,720 parameters, 161.25 MiB float32" in said
    assert "the moments of compensations are shared out over 16 ranks" in said
    assert "optimizer state" not in said
    routers = trained - 42_270_720
    assert plans[0].moments == pytest.approx(8 * (42_270_720 / 16 + routers), rel=0.01)


def test_much_optimizer_state_is_said(tmp_path: Path) -> None:
    """Where it is more than one percent of a rank, and small enough to be held by all."""
    flags = ["--model", "demo", "--data", "demo", "--compensation", "low_rank", "--max_steps", "1"]
    config = parse_run_config([*flags, "--seq_length", "16"])
    said = " ".join(
        " ".join(dry_run.dry_run_lines(config, resolve_source(config.model), 2)).split()
    )
    assert re.search(r"; the optimizer state in it, .+, is [\d.]+ % of what a rank needs", said)
    assert "and every rank holds all of it: a lower --lora_rank or --compensation_rank" in said
