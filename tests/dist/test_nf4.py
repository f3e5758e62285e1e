"""A base in 4 bit on ranks: replicas and stages learn what one process learns, and hold what was
planned."""

from pathlib import Path

import pytest
import torch
from families import tiny_model
from spawn import run_worker
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from megaskip.config import parse_run_config
from megaskip.parallel.estimate import estimate
from megaskip.parallel.estimate_stages import estimate_stages
from megaskip.parallel.loading.source import resolve_source

pytest.importorskip("bitsandbytes", reason="the [4bit] extra is not installed")
FLAGS = ["--distill", "0.5", "--capacity", "0.3", "--lora_rank", "2"]
NF4 = ["--base_dtype", "nf4", *FLAGS]
STAGES = ["--pipeline_stages", "2", "--pipeline_partition", "2", "--activation_checkpointing"]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
PACKED = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    llm_int8_skip_modules=["lm_head", "down_proj"],  # whose rows are no whole blocks of 64
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicas_and_stages_of_a_4_bit_base_are_one_process(ranks: int, tmp_path: Path) -> None:
    """Loss and gradients of a step of routers and adapters, of a base that is packed on loading and
    of one that lies packed in its folder; the first stage's layers have no router."""
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path)
    packed = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PACKED).save_pretrained(
        packed
    )
    cases = [
        {"model": str(folder), "flags": [*flags, *engine], "parts": list(range(ranks))}
        for folder, flags in ((tmp_path, NF4), (packed, FLAGS))
        for engine in ([], STAGES)
    ]
    config = parse_run_config(["--model", str(tmp_path), *NF4, *STAGES])
    source = resolve_source(config.model)
    whole = estimate(config, source, world_size=2, ds_content=None)
    stages = estimate_stages(config, source)
    planned = [2 * (whole, stages[rank % 2]) for rank in range(ranks)]
    alone = run_worker("gradients", 1, model=str(tmp_path), cases=cases[:1])[0][0]
    skipped = "adapter.model.layers.2.self_attn."  # by all rows
    assert all(
        float(gradient.abs().max()) > 0
        for name, gradient in alone["gradients"].items()
        if not name.startswith(skipped)
    )
    for results, plans in zip(
        run_worker("gradients", ranks, model=str(tmp_path), cases=cases), planned, strict=True
    ):
        for mine, plan in zip(results, plans, strict=True):
            assert mine["loss_task"] == pytest.approx(alone["loss_task"], rel=1e-6)
            for name, gradient in alone["gradients"].items():
                torch.testing.assert_close(mine["gradients"][name], gradient, rtol=1e-5, atol=1e-9)
            assert plan.weights == pytest.approx(mine["bytes"]["backbone"], rel=0.15)
