"""Prefill, decode and training's forward pass with tensors that say that they lie on a GPU."""

import dataclasses
from typing import Any

import pytest
import torch
from families import tiny_model
from pretended_gpu import pretended_gpu
from routed_models import as_exported, padded_ids, randomise, trained
from tiny_run import rows, tiny_config

from megaskip import RouterConfig, attach_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.data import collate
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import Topology
from megaskip.routing.copies import CopyToHost

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows real ones")


def test_it_refuses_tensors_that_are_apart_and_makes_copies_late() -> None:
    """What is shown below can fail."""
    host = torch.arange(3.0)
    with pretended_gpu() as gpu:
        there = host.to("cuda")
        assert there.is_cuda and there.device.index == 0 and not gpu.waits
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            there + host
        copy = CopyToHost(there + 1)
        assert copy._copy.isnan().all() and not copy.has_arrived
        assert copy.read().tolist() == [1, 2, 3] and len(gpu.waits) == 1


@pytest.mark.parametrize(
    ("granularity", "kv"),
    [("block_sequence", "keep"), ("mlp_token", "keep"), ("attn_token", "drop")],
)
def test_a_model_on_a_gpu_writes_what_it_writes_on_the_cpu(granularity: str, kv: str) -> None:
    model = as_exported(*trained("llama", granularity), kv=kv)
    ids, mask = padded_ids(rows=3)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **options)
    with pretended_gpu():
        model.to("cuda").tie_weights()
        tokens = model.generate(ids.to("cuda"), attention_mask=mask.to("cuda"), **options)
        assert tokens.is_cuda and torch.equal(tokens.cpu(), expected)


def test_an_engine_on_a_gpu_evaluates_as_on_the_cpu() -> None:
    router = RouterConfig(layers="1-4", granularity="mlp_sequence", compensation="low_rank")
    config = dataclasses.replace(tiny_config(), router=router)
    batch = collate(rows(3), pad_token_id=0, prompt_tokens=32)

    def evaluated(device: str) -> Any:
        topology = Topology(rank=0, world_size=1, local_rank=0, device=torch.device(device))
        model: Any = tiny_model()
        model.to(device).tie_weights()
        routers = attach_routers(model, config.router, register=False)
        randomise(routers.cpu())
        engine = Engine(TaskLoss(model, chunk_tokens=64), routers.to(device), config, topology)
        return engine.evaluate([batch], routed=True)

    expected = evaluated("cpu")
    with pretended_gpu():
        assert evaluated("cuda") == expected
    assert 0 < expected.capacity < 1
