"""What waits for a GPU, counted on a CPU: a number here that grows makes a GPU slower."""

import dataclasses
from typing import Any

import pytest
import torch
from families import tiny_model
from tensor_calls import IndexCalls, Waits
from tiny_run import alone, rows, tiny_config, tiny_engine, tiny_full_engine

from megaskip import RouterConfig, attach_routers
from megaskip.config import RunConfig
from megaskip.data import Batch, PackedRow, collate
from megaskip.inference.executor import InferenceExecutor

TRANSFORMERS_READS = "masking_utils.py"
"""Each forward pass reads whether the positions are those of packed rows."""


def padded(seed: int) -> Batch:
    return collate(rows(3, seed), pad_token_id=0, prompt_tokens=32)


def packed(seed: int) -> Batch:
    packs = [PackedRow(segments=tuple(rows(3, seed)))]
    return collate(packs, pad_token_id=0, prompt_tokens=32)


def on_host(batch: Batch) -> Batch:
    for tensor in (getattr(batch, field.name) for field in dataclasses.fields(batch)):
        if isinstance(tensor, torch.Tensor):
            Waits.put_on_host(tensor)
    return batch


def routed(granularity: str, **router: Any) -> RunConfig:
    config = RouterConfig(layers="1-4", granularity=granularity, **router)
    return dataclasses.replace(tiny_config(), router=config)


@pytest.mark.parametrize(
    ("make", "config", "make_batch"),
    [
        (tiny_engine, routed("attn_sequence"), padded),
        (tiny_engine, routed("block_sequence"), packed),
        (tiny_engine, routed("mlp_token", compensation="bias"), padded),
        (tiny_engine, routed("attn_sequence", budget="layer"), padded),
        (tiny_engine, tiny_config(distill=0.3, noise=0.5), padded),
        (tiny_full_engine, tiny_config(), padded),
    ],
)
def test_a_training_step_waits_once_however_many_micro_batches_it_has(
    make: Any, config: RunConfig, make_batch: Any
) -> None:
    with alone() as topology:
        engine = make(config, topology)
        engine.module.needs_mask = False
        for state in engine.optimizer.state.values():
            Waits.put_on_host(state["step"])
        batches = [on_host(make_batch(seed)) for seed in range(3)]
        waited: list[int] = []
        with Waits() as waits:

            def meanwhile() -> None:
                waited.append(sum(TRANSFORMERS_READS not in call for call in waits.calls))

            engine.train_step(batches, 1e-3, 0.5, meanwhile)
    calls = waits.take()
    assert waited == [0], "the next batches are prepared after the device was waited for"
    own = [call for call in calls if TRANSFORMERS_READS not in call]
    assert len(own) == 1, own
    passes = len(batches) * (2 if config.optim.distill else 1)
    assert len(calls) - len(own) <= passes, calls


def test_the_count_can_fail() -> None:
    tensor = torch.arange(3)
    with Waits() as waits:
        tensor[tensor > 1], tensor.sum().item(), bool(tensor.any()), tensor.cpu().tolist()
        torch.tensor([1.0], device=torch.device("cpu")), tensor.new_tensor([2])
        torch.tensor([1.0]).to(torch.device("cpu"))
        assert len(waits.take()) == 7
        torch.tensor([1.0]).sum().item()  # of the host all along
        torch.full((2,), 1.0, device=torch.device("cpu")), tensor.new_zeros(3)
        assert not waits.take()


def routed_model(granularity: str, kv: str = "keep") -> Any:
    model = tiny_model()
    routers = attach_routers(model, RouterConfig(layers="1-4", granularity=granularity))
    for number, router in enumerate(routers.parameters()):
        torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
    routers.executor = InferenceExecutor(unit=routers.config.unit, kv=kv)
    return model


LAYERS = 4
IDS = torch.arange(3, 75).reshape(6, 12)


@pytest.mark.parametrize(
    ("granularity", "kv", "prefill", "decode"),
    [
        ("attn_sequence", "keep", LAYERS, 0),
        ("mlp_sequence", "keep", LAYERS, 0),
        ("block_sequence", "keep", LAYERS, 0),
        ("attn_token", "keep", 0, 0),
        ("attn_token", "drop", LAYERS, LAYERS),
        ("mlp_token", "keep", LAYERS, LAYERS),
    ],
)
def test_generation_waits_once_a_decision(
    granularity: str, kv: str, prefill: int, decode: int
) -> None:
    model = routed_model(granularity, kv)

    def waits_of(ids: torch.Tensor, cache: Any = None) -> tuple[int, Any]:
        with torch.no_grad(), Waits() as waits:
            out = model(ids, past_key_values=cache, use_cache=True)
        own = [call for call in waits.take() if "transformers" not in call]
        return len(own), out.past_key_values

    count, cache = waits_of(IDS)
    assert count == prefill
    assert 0 < model.skip_routers.capacity() < 1
    for _ in range(2):
        count, cache = waits_of(IDS[:, -1:], cache)
        assert count == decode
    beams = torch.tensor([1, 1, 0, 3, 4, 2])
    with Waits() as waits:
        cache.reorder_cache(beams)
    if granularity.endswith("sequence"):
        assert len(waits.take()) == 1, "beams are re-ordered by one index, read once"
        assert waits_of(IDS[:, -1:], cache)[0] == 0


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_decode_chooses_rows_only_in_layers_whose_rows_differ(granularity: str) -> None:
    """Hidden states, cosines, sines, positions and back in an attention; hidden states and back in
    an MLP. What was found at the prefill is not found again."""
    model = routed_model(granularity)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        cache = model(IDS, attention_mask=mask, use_cache=True).past_key_values
        kept = [decision.rows for decision in model.skip_routers.decisions().values()]
        mixed = sum(not (rows.all or rows.none) for rows in kept)
        position = torch.full((6, 1), IDS.shape[1])
        with IndexCalls() as calls:
            model(IDS[:, -1:], position_ids=position, past_key_values=cache)
    each = {"attn_sequence": 5, "mlp_sequence": 2, "block_sequence": 7}[granularity]
    assert mixed > 0 and calls.count == each * mixed
