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
    """Without compensations, and bit for bit the same with maps that have not learnt.

    Decisions are exactly the stored ones. Logits, losses and gradients have a tolerance there:
    another version of torch or transformers rounds them otherwise.
    """
    cases = load_file(HERE / family / "cases.safetensors")
    numbers = published(family, granularity, cases["input_ids"], compensation="none")
    for name, found in numbers.items():
        expected = cases[f"{granularity}.{name}"]
        atol = 0 if name.startswith("mask") else 1e-5
        torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=atol)
    with_maps = published(family, granularity, cases["input_ids"], compensation="low_rank")
    assert all(torch.equal(with_maps[name], found) for name, found in numbers.items())


def published(
    family: str, granularity: str, ids: torch.Tensor, *, compensation: str
) -> dict[str, torch.Tensor]:
    """Return the numbers of the stored model and routers, by their names in the stored cases."""
    folder = HERE / family
    stored = load_file(folder / "routers.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    config = RouterConfig(
        granularity=granularity,
        pool="all",
        budget="layer",
        penalty_weight=0.1,
        capacity=0.25,
        compensation=compensation,
    )
    routers = attach_routers(model, config)
    assert routers.layers == LAYERS
    with torch.no_grad():
        for layer in LAYERS:
            routers.router(layer).weight.copy_(stored[f"model.layers.{layer}.router.weight"])
    output = model(ids, labels=ids)
    penalty = routers.penalty()
    loss = output.loss + penalty
    loss.backward()
    numbers = {"logits": output.logits[:2], "loss_task": output.loss}
    numbers |= {"loss_capacity": penalty, "loss_total": loss}
    for layer in LAYERS:
        numbers[f"mask.{layer}"] = routers.keep()[layer]
        numbers[f"router_grad.{layer}"] = routers.router(layer).weight.grad
    return numbers
