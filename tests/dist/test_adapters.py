"""LoRA with routers and compensations on ranks: ZeRO-3, stages and replicas compute what one
process computes, and the moments of both are shared out."""

from pathlib import Path

import pytest
import torch
from families import tiny_model
from spawn import run_worker

LORA = ["--lora_rank", "2", "--distill", "0.3", "--train_execution", "sparse"]
LORA += ["--compensation", "low_rank", "--compensation_rank", "2"]
ENGINES = {
    "ZeRO-3": ["--ds_config", "ds_configs/zero3.json"],
    "replicas": [],
    # The first stage has adapters and no router, and its gradients come from the second.
    "stages": ["--pipeline_stages", "2", "--pipeline_partition", "2", "--layers", "3-4"],
}


def test_adapters_and_routers_learn_alike_on_every_engine(tmp_path: Path) -> None:
    """Gradients of a step, and weights after two of them, on two ranks and in one process."""
    tiny_model("llama").save_pretrained(tmp_path)
    extra = ["--layers", "3-4", "--activation_checkpointing"]
    cases = [{"flags": [*LORA, *extra, *flags], "parts": [0, 1]} for flags in ENGINES.values()]
    alone = run_worker("adapters", 1, model=str(tmp_path), cases=[cases[1]])[0][0]
    assert sum(float(g.abs().max()) > 0 for g in alone["gradients"].values()) > 80
    for results in run_worker("adapters", 2, model=str(tmp_path), cases=cases):
        for engine, mine in zip(ENGINES, results, strict=True):
            assert mine["loss_task"] == pytest.approx(alone["loss_task"], rel=1e-6), engine
            assert mine["gathered"] == 0, engine
            assert mine["moments"] == pytest.approx(alone["moments"] / 2, rel=0.05), engine
            for kind in ("gradients", "weights"):
                for name, tensor in mine[kind].items():
                    torch.testing.assert_close(
                        tensor, alone[kind][name], rtol=1e-4, atol=1e-6, msg=f"{engine}: {name}"
                    )
