"""Engines: sums are one tensor on the way, any split of a batch gives the same step, and a pass can
be ended between two batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import COMMON, tiny_model
from tiny_run import alone, rows, tiny_config, tiny_engine, tiny_full_engine
from torch.nn.functional import cross_entropy
from transformers import PhiConfig, PhiForCausalLM

from megaskip.arch.task_loss import TaskLoss
from megaskip.config import ModelConfig
from megaskip.data import Batch, collate
from megaskip.data.collate import placeholder_batch
from megaskip.errors import UnsupportedModelError
from megaskip.parallel.build import build_full_engine
from megaskip.parallel.full_engine import FullEngine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.position_losses import PositionLosses
from megaskip.parallel.results import EvalSums, StepSums
from megaskip.routing import Counts


def batch(count: int, seed: int) -> Batch:
    return collate(rows(count, seed), pad_token_id=0, prompt_tokens=32)


def together(first: Batch, second: Batch) -> Batch:
    """Return two batches of equal length as one."""
    fields = ("input_ids", "labels", "token_mask", "prompt_mask", "position_ids")
    return Batch(**{f: torch.cat([getattr(first, f), getattr(second, f)]) for f in fields})


def test_sums_survive_packing_and_add_up() -> None:
    scalar = torch.tensor
    first = StepSums(
        loss_task=scalar(1.5),
        loss_penalty=scalar(0.25),
        counts=Counts.unpack(torch.arange(8, dtype=torch.float64)),
    )
    packed = first.pack()
    assert packed.dtype == torch.float64 and packed.shape == (10,)
    again = StepSums.unpack(packed)
    assert (float(again.loss_task), float(again.loss_penalty)) == (1.5, 0.25)
    assert torch.equal(again.counts.pack(), first.counts.pack())
    twice = first + first
    assert float(twice.loss_task) == 3.0 and twice.counts.units.tolist() == [4.0, 6.0]
    nothing = StepSums.zeros(2)
    assert torch.equal((first + nothing).pack(), packed)


def test_a_held_out_result_has_the_standard_error_of_its_rows() -> None:
    shares = torch.tensor([1.0, 0.5, 0.0, 0.5], dtype=torch.float64)
    units = torch.tensor([4.0], dtype=torch.float64)
    result = EvalSums(
        loss=torch.tensor(12.0),
        supervised=torch.tensor(6.0),
        rows=torch.tensor(4.0),
        shares=shares.sum(),
        squared_shares=shares.square().sum(),
        counts=Counts(kept=units / 2, units=units, logits=units, squares=units),
    ).result()
    assert result.loss == 2.0 and result.capacity == 0.5 and result.capacity_per_layer == (0.5,)
    assert result.capacity_error == pytest.approx(float(shares.std(correction=0)) / math.sqrt(4))


@pytest.mark.parametrize("make", [tiny_engine, tiny_full_engine])
def test_micro_batches_give_the_step_of_the_whole_batch(make: Any) -> None:
    parts = [batch(3, seed=1), batch(3, seed=2)]
    results, gradients = [], []
    for batches in (parts, [together(*parts)]):
        with alone() as topology:
            engine = make(tiny_config(), topology)
            results.append(engine.train_step(batches, 0.0))
            gradients.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]))
    for field in ("loss_task", "loss_penalty", "capacity", "tokens", "supervised_fraction"):
        values = [getattr(result, field) for result in results]
        assert values[0] == pytest.approx(values[1], rel=1e-5), field
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_rank_without_a_batch_runs_one_that_counts_for_nothing() -> None:
    empty = placeholder_batch(torch.device("cpu"))
    assert empty.counts.supervised == 0
    with alone() as topology:
        engine = tiny_engine(tiny_config(), topology)
        mine = [batch(2, seed=1)]
        assert engine.evaluate([*mine, None], routed=True) == engine.evaluate(mine, routed=True)
        full = tiny_full_engine(tiny_config(), topology)
        assert full.evaluate([*mine, None]) == full.evaluate(mine)


def test_held_out_losses_by_position_add_up_to_the_held_out_loss() -> None:
    batches = [batch(3, seed=1), None, batch(2, seed=2)]
    with alone() as topology:
        engine = tiny_engine(tiny_config(), topology)
        whole = engine.evaluate(batches, routed=True)
        by_position = PositionLosses(12, topology.device)  # rows have 6 to 13 tokens
        told = engine.evaluate(batches, routed=True, by_position=by_position)
        spans = by_position.over_ranks()
    assert told.loss == pytest.approx(whole.loss)
    # The first three tokens are the prompt; what lies behind the last span counts in it.
    assert [(span.first, span.stop) for span in spans] == [
        *((3, 5), (5, 6), (6, 8), (8, 9), (9, 11), (11, 12)),
    ]
    tokens = [span.tokens for span in spans]
    assert sum(tokens) == sum(each.counts.supervised for each in batches if each is not None)
    total = sum(span.loss * span.tokens for span in spans)
    assert total / sum(tokens) == pytest.approx(whole.loss)


class Stop(Exception):
    """Ends a pass."""


@pytest.mark.parametrize("routed", [True, False])
def test_a_check_before_each_batch_can_end_a_pass_and_leaves_nothing_behind(routed: bool) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    with alone() as topology:
        engine = tiny_engine(tiny_config(), topology)
        batches = [batch(2, seed=1), None, batch(2, seed=2), None]
        before = engine.evaluate(batches, routed=True)
        with pytest.raises(Stop):
            engine.evaluate(batches, routed=routed, check=check)
        assert engine.evaluate(batches, routed=True) == before
        calls.clear()
        full = tiny_full_engine(tiny_config(), topology)
        with pytest.raises(Stop):
            full.evaluate(batches, check=check)
    assert len(calls) == 3


def test_every_weight_learns_as_from_the_models_own_loss_and_none_drops_out_held_out() -> None:
    """Phi's head has a bias."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**COMMON, attention_dropout=0.5)).eval()
    read = batch(3, seed=1)
    logits = model(input_ids=read.input_ids, attention_mask=read.token_mask.long()).logits
    own = cross_entropy(logits[:, :-1].flatten(0, 1), read.labels[:, 1:].flatten())
    expected = torch.autograd.grad(own, list(model.parameters()))
    with alone() as topology:
        config = tiny_config(max_grad_norm=0.0)
        engine = FullEngine(TaskLoss(model, chunk_tokens=4), config, topology)
        engine.train_step([read], 0.0)
        for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
        model.train()
        assert engine.evaluate([read]) == pytest.approx(own.item(), rel=1e-5)
        assert all(module.training for module in model.modules())


def test_a_model_whose_own_loss_is_another_is_refused(tmp_path: Path) -> None:
    """The config of this llama scales logits, of which its code knows nothing."""
    tiny_model(logit_scale=100.0).save_pretrained(tmp_path)
    source = resolve_source(ModelConfig(model=str(tmp_path)))
    with alone() as topology, pytest.raises(UnsupportedModelError, match="something to its logits"):
        build_full_engine(tiny_config(), topology, source)
