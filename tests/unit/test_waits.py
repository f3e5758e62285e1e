"""What waits for a GPU, counted on a CPU: a number here that grows makes a GPU slower."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import as_exported
from tensor_calls import IndexCalls, Waits
from tiny_run import (
    alone,
    router_trainer,
    rows,
    tiny_config,
    tiny_engine,
    tiny_full_engine,
)

from megaskip import RouterConfig, attach_routers
from megaskip.arch import find_decoder
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.checkpoint.base import describe_base
from megaskip.config import RunConfig
from megaskip.data import Batch, PackedRow, collate
from megaskip.inference.executor import InferenceExecutor
from megaskip.integrations.tuning import RouterTuning
from megaskip.parallel.results import PendingStep
from megaskip.routing import DenseExecutor, SparseExecutor
from megaskip.routing.copies import CopyToHost
from megaskip.routing.decision import SelectedRows

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
def test_no_training_step_waits_however_many_micro_batches_it_has(
    make: Any, config: RunConfig, make_batch: Any
) -> None:
    with alone() as topology:
        engine = make(config, topology)
        engine.module.needs_mask = False
        for state in engine.optimizer.state.values():
            Waits.put_on_host(state["step"])
        batches = [on_host(make_batch(seed)) for seed in range(3)]
        with Waits() as waits:
            pending = [engine.launch_step(batches, 1e-3, 0.5) for _ in range(2)]
            calls = waits.take()
            pending[-1].result()
            assert len(waits.take()) == 1, "a result is read with one wait"
    own = [call for call in calls if TRANSFORMERS_READS not in call]
    assert not own
    passes = 2 * len(batches) * (2 if config.optim.distill else 1)
    assert len(calls) <= passes, calls


def test_a_step_of_another_librarys_trainer_does_not_wait_for_its_routers() -> None:
    model = tiny_model("llama")
    routers = attach_routers(model, RouterConfig(layers="1-4"))
    tuning = RouterTuning(model, routers, describe_base(model.config))
    batches = [padded(seed) for seed in range(2)]
    inputs = [
        {"input_ids": b.input_ids, "attention_mask": b.token_mask, "labels": b.labels}
        for b in batches
    ]
    with Waits() as waits:
        tuning.begin_step(inputs)
        for batch in inputs:
            with tuning.forward(batch, trains=True):
                hidden = model.model(batch["input_ids"]).last_hidden_state
            tuning.add_penalty(hidden.mean(), replicas=1, scaled=True).backward()
        tuning.end_step(0.5)
        assert not [call for call in waits.take() if TRANSFORMERS_READS not in call]
    assert 0 < tuning.take_step_numbers()["capacity"] <= 1


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_sparse_training_waits_once_a_layer_and_not_again_in_the_backward_pass(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []  # Waits does not see what the backward pass computes again
    of = SelectedRows.of
    monkeypatch.setattr(SelectedRows, "of", lambda *args: read.append(args) or of(*args))
    with alone() as topology:
        engine = tiny_engine(routed(granularity), topology)
        engine.module.needs_mask = False
        engine.routers.executor = SparseExecutor()
        checkpoint_activations(engine.model, 1)
        for number, router in enumerate(engine.routers.parameters()):
            torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
        for state in engine.optimizer.state.values():
            Waits.put_on_host(state["step"])
        batches = [on_host(padded(seed)) for seed in range(2)]
        with Waits() as waits:
            result = engine.launch_step(batches, 1e-3, 0.5)
            calls = [call for call in waits.take() if TRANSFORMERS_READS not in call]
    assert 0 < result.result().capacity < 1
    assert len(calls) == len(read) == LAYERS * len(batches), calls


def test_a_run_waits_for_a_device_that_lags_when_it_logs_saves_or_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it writes is what it writes where nothing lags."""
    config = tiny_config()  # of six steps: logs and saves every second, evaluates every third
    written, read = {}, []
    take = PendingStep.result
    for lags in (False, True):
        monkeypatch.setattr(CopyToHost, "has_arrived", not lags)
        monkeypatch.setattr(PendingStep, "result", lambda self: read.append(1) or take(self))
        with alone() as topology:
            trainer = router_trainer(tmp_path / str(lags), topology, config)
            launch, reads = trainer.engine.launch_step, []

            def launched(*args: Any, launch: Any = launch, reads: Any = reads) -> Any:
                reads.append(len(read))
                return launch(*args)

            monkeypatch.setattr(trainer.engine, "launch_step", launched)
            read.clear()
            trainer.run()
        if lags:
            assert reads == [0, 0, 2, 3, 4, 4], "read before steps 1 to 6"
        steps = (tmp_path / str(lags) / "metrics.jsonl").read_text().splitlines()
        noise = {"tokens_per_second", "peak_memory_gib"}
        written[lags] = [
            {k: v for k, v in json.loads(line).items() if k not in noise} for line in steps
        ]
    assert written[True] == written[False] and len(written[True]) == config.optim.max_steps


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


def routed_model(granularity: str, kv: str = "keep", **settings: Any) -> Any:
    model = tiny_model()
    config = RouterConfig(layers="1-4", granularity=granularity, **settings)
    routers = attach_routers(model, config)
    for number, router in enumerate(routers.parameters()):
        torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
    routers.executor = InferenceExecutor(unit=routers.config.unit, kv=kv)
    return model


LAYERS = 4
IDS = torch.arange(3, 75).reshape(6, 12)


@pytest.mark.parametrize(
    ("granularity", "kv", "compensation", "prefill", "decode"),
    [
        ("attn_sequence", "keep", "none", LAYERS, 0),
        ("attn_sequence", "keep", "low_rank", LAYERS, 0),
        ("mlp_sequence", "keep", "none", LAYERS, 0),
        ("mlp_sequence", "keep", "bias", LAYERS, 0),
        ("block_sequence", "keep", "none", LAYERS, 0),
        ("block_sequence", "keep", "low_rank", LAYERS, 0),
        ("attn_token", "keep", "none", 0, 0),
        ("attn_token", "keep", "low_rank", LAYERS, LAYERS),
        ("attn_token", "drop", "none", LAYERS, LAYERS),
        # Which real tokens are kept, and which ones get the compensation.
        ("attn_token", "drop", "bias", 2 * LAYERS, 2 * LAYERS),
        ("mlp_token", "keep", "none", LAYERS, LAYERS),
        ("mlp_token", "keep", "low_rank", LAYERS, LAYERS),
    ],
)
def test_generation_waits_once_a_decision(
    granularity: str, kv: str, compensation: str, prefill: int, decode: int
) -> None:
    model = routed_model(granularity, kv, compensation=compensation)

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


@pytest.mark.parametrize(
    "granularity", ["attn_sequence", "mlp_sequence", "block_sequence", "mlp_token"]
)
def test_a_prefill_waits_once_where_the_first_routed_layer_decides_for_all(
    granularity: str,
) -> None:
    model = routed_model(granularity, router_input="first")
    routers, read = model.skip_routers, []
    hook = (
        find_decoder(model)
        .layers[1]
        .self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(kwargs["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad(), Waits() as waits:
        out = model(IDS, use_cache=True)
    hook.remove()
    assert len([call for call in waits.take() if "transformers" not in call]) == 1
    assert 0 < routers.capacity() < 1
    features = read[0] if granularity == "mlp_token" else read[0].mean(1, keepdim=True)
    for layer, decision in routers.decisions().items():
        torch.testing.assert_close(decision.logit, routers.router(layer)(features))
    with torch.no_grad(), Waits() as waits:
        model(IDS[:, -1:], past_key_values=out.past_key_values)
    own = [call for call in waits.take() if "transformers" not in call]
    assert len(own) == (granularity == "mlp_token")
    assert torch.equal(as_exported(model, routers)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_token"])
def test_routers_of_the_first_layers_input_learn_alike_where_activations_are_recomputed(
    granularity: str,
) -> None:
    gradients = []
    for executor in (DenseExecutor(), SparseExecutor()):
        for checkpointed in (False, True):
            model = routed_model(granularity, router_input="first", threshold=0.4)
            routers = model.skip_routers
            routers.executor = executor
            model.requires_grad_(False)
            routers.requires_grad_(True)
            if checkpointed:
                checkpoint_activations(model.train(), 1)
            (model(IDS, labels=IDS).loss + routers.penalty()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in routers.parameters()]))
    assert all(line.abs().max() > 0 for line in gradients[0].view(LAYERS, -1))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[2], gradients[3])


@pytest.mark.parametrize("granularity", ["attn_sequence", "mlp_sequence", "block_sequence"])
def test_decode_selects_rows_only_in_layers_whose_rows_differ(granularity: str) -> None:
    """Hidden states, and back, in a layer; cosines, sines, positions and the mask once for all
    layers. What was found at the prefill, or made for the first step, is not made again."""
    model = routed_model(granularity)
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        cache = model(IDS, attention_mask=mask, use_cache=True).past_key_values
        kept = [decision.rows for decision in model.skip_routers.decisions().values()]
        mixed = sum(not (rows.all or rows.none) for rows in kept)
        for step in range(2):
            position = torch.full((6, 1), IDS.shape[1] + step)
            mask = torch.ones(6, IDS.shape[1] + step + 1).index_fill_(1, torch.tensor([3]), 0)
            with IndexCalls() as calls:
                model(IDS[:, -1:], mask, position_ids=position, past_key_values=cache)
            own = [call for call in calls.take() if "transformers" not in call]
            if step:  # the first one makes the index that serves a whole generation
                assert len(own) == 2 * mixed + (0 if granularity == "mlp_sequence" else 4), own
    assert mixed > 1
