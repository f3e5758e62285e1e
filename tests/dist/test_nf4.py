"""A base in 4 bit on ranks: replicas and stages learn what one process learns, and hold what was
planned."""

from pathlib import Path

import pytest
import torch
from families import tiny_model
from spawn import run_worker

from megaskip.config import parse_run_config
from megaskip.parallel.estimate import estimate
from megaskip.parallel.estimate_stages import estimate_stages
from megaskip.parallel.loading.source import resolve_source

pytest.importorskip("bitsandbytes", reason="the [4bit] extra is not installed")
NF4 = ["--base_dtype", "nf4", "--distill", "0.5", "--capacity", "0.3"]
STAGES = ["--pipeline_stages", "2", "--pipeline_partition", "2", "--activation_checkpointing"]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


def test_replicas_and_stages_of_a_4_bit_base_are_one_process(tmp_path: Path) -> None:
    """Loss and gradients of a step; the first stage's layers have no router."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    cases = [{"flags": [*NF4, *flags], "parts": [0, 1]} for flags in ([], STAGES)]
    config = parse_run_config(["--model", str(tmp_path), *NF4, *STAGES])
    source = resolve_source(config.model)
    whole = estimate(config, source, world_size=2, ds_content=None)
    planned = zip([whole, whole], estimate_stages(config, source), strict=True)
    alone = run_worker("gradients", 1, model=str(tmp_path), cases=cases[:1])[0][0]
    assert all(float(gradient.abs().max()) > 0 for gradient in alone["gradients"].values())
    for results, plans in zip(
        run_worker("gradients", 2, model=str(tmp_path), cases=cases), planned, strict=True
    ):
        for mine, plan in zip(results, plans, strict=True):
            assert mine["loss_task"] == pytest.approx(alone["loss_task"], rel=1e-6)
            for name, gradient in alone["gradients"].items():
                torch.testing.assert_close(mine["gradients"][name], gradient, rtol=1e-5, atol=1e-9)
            assert plan.weights == pytest.approx(mine["bytes"]["backbone"], rel=0.15)
