"""The published method's numbers are reproduced by the configuration that asks for them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megaskip import RouterConfig, attach_routers
from megaskip.config import SUBLAYER_GRANULARITIES

HERE = Path(__file__).parent
LAYERS = (1, 2)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_masks_losses_and_router_gradients_are_the_published_ones(
    family: str, granularity: str
) -> None:
    folder = HERE / family
    cases = load_file(folder / "cases.safetensors")
    stored = load_file(folder / "routers.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    config = RouterConfig(
        granularity=granularity, pool="all", budget="layer", penalty_weight=0.1, capacity=0.25
    )
    routers = attach_routers(model, config)
    assert routers.layers == LAYERS
    with torch.no_grad():
        for layer in LAYERS:
            routers.router(layer).weight.copy_(stored[f"model.layers.{layer}.router.weight"])
    output = model(cases["input_ids"], labels=cases["input_ids"])
    penalty = routers.penalty()
    (output.loss + penalty).backward()

    def check(found: torch.Tensor, name: str) -> None:
        expected = cases[f"{granularity}.{name}"]
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-5)

    check(output.logits[:2], "logits")
    check(output.loss, "loss_task")
    check(penalty, "loss_capacity")
    check(output.loss + penalty, "loss_total")
    for layer in LAYERS:
        check(routers.keep()[layer], f"mask.{layer}")
        check(routers.router(layer).weight.grad, f"router_grad.{layer}")
