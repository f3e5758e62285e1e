"""Padding on the right: attention needs no mask for it, and where it does a run finds out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from tensor_calls import AttentionMasks
from tiny_run import alone, rows, tiny_config

from megaskip import attach_routers
from megaskip.arch.padding import needs_mask
from megaskip.arch.task_loss import TaskLoss
from megaskip.config import ModelConfig
from megaskip.data import Batch, collate
from megaskip.export.static_measure import measure_capacity
from megaskip.parallel.build import build_engine, build_full_engine
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.study.scoring import score


def padded(count: int = 3, seed: int = 0) -> Batch:
    return collate(rows(count, seed), pad_token_id=0, prompt_tokens=32, pad_to_multiple=24)


def one_step(family: str, *, needs_mask: bool) -> tuple[Any, dict[str, Any], list[Any]]:
    """Return what a step of two micro-batches computes, the gradients, and held-out numbers."""
    config = tiny_config(distill=0.3)
    # Heads of their own: without a mask transformers leaves the sum over the query heads of a group
    # to the kernel, which adds them up in another order.
    model = tiny_model(family, num_key_value_heads=4)
    with alone() as topology:
        routers = attach_routers(model, config.router, register=False)
        loss = TaskLoss(model, chunk_tokens=64)
        loss.needs_mask = needs_mask
        engine = Engine(loss, routers, config, topology)
        for number, router in enumerate(routers.parameters()):
            torch.nn.init.normal_(router, generator=torch.Generator().manual_seed(number))
        result = engine.train_step([padded(seed=1), padded(seed=2)], 0.0)
        gradients = {name: p.grad.clone() for name, p in engine.parameters.items()}
        held_out = [engine.evaluate([padded(seed=3)], routed=routed) for routed in (True, False)]
    return result, gradients, held_out


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_with_a_mask_bit_for_bit(family: str) -> None:
    masked, gradients, held_out = one_step(family, needs_mask=True)
    plain, same_gradients, same_held_out = one_step(family, needs_mask=False)
    assert plain == masked and same_held_out == held_out
    assert 0 < plain.capacity < 1
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(same_gradients[name], gradient), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_families_need_no_mask(family: str, dtype: torch.dtype) -> None:
    assert not needs_mask(tiny_model(family).to(dtype))


def test_a_model_that_looks_ahead_needs_its_mask() -> None:
    both_ways = tiny_model("gemma3", use_bidirectional_attention=True)
    assert needs_mask(both_ways)
    assert needs_mask(both_ways.bfloat16())


@contextmanager
def built(folder: Path, *, full: bool = False) -> Iterator[Any]:
    config = tiny_config()
    source = resolve_source(ModelConfig(model=str(folder), dtype="float32"))
    with alone() as topology:
        if full:
            yield build_full_engine(config, topology, source)
        else:
            yield build_engine(config, topology, source, None)


@pytest.mark.parametrize("full", [False, True])
def test_no_mask_reaches_attention_in_a_run_and_its_evaluation(full: bool, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with built(tmp_path, full=full) as engine, AttentionMasks() as seen:
        engine.train_step([padded()], 0.0)
        engine.evaluate([padded()], **({} if full else {"routed": True}))
    assert seen.calls > 0 and seen.masked == 0


MEASURES: dict[str, Callable[..., Any]] = {
    "capacity": lambda model, routers: measure_capacity(model, routers, [padded()]),
    "scores": lambda model, routers: score(model, routers, [padded()]).nll.tolist(),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_measured_before_and_after_training_needs_no_mask_either(name: str) -> None:
    """The start-up pass alone has one: half of its calls."""
    model = tiny_model(num_key_value_heads=4)
    routers = attach_routers(model, tiny_config().router)
    with AttentionMasks() as probe:
        needs_mask(model, routers)
    with AttentionMasks() as seen:
        plain = MEASURES[name](model, routers)
    assert seen.calls > probe.calls and seen.masked == probe.masked == probe.calls // 2
    with pytest.MonkeyPatch.context() as patch:
        for module in ("export.static_measure", "study.scoring"):
            patch.setattr(f"megaskip.{module}.needs_mask", lambda *_: True)
        assert MEASURES[name](model, routers) == plain
