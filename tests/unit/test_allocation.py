"""Each layer gets as much of the capacity as its units are worth, as measured."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import VOCABULARY, as_exported, randomise
from torch import Tensor

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.allocation import (
    _is_lower,
    _shares_above,
    _static_drop,
    allocate,
    skip_costs,
)
from megaskip.calibration.capacities import calibrate_all, with_points
from megaskip.calibration.cost_model import SkipCostModel
from megaskip.calibration.similarity import mean_similarity
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import process_group, read_topology

COSTLY = 2
"""The layer whose attention changes the most."""


def batch(seed: int, rows: int = 32, tokens: int = 8) -> Batch:
    ids = torch.randint(
        3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        labels=ids,
        token_mask=real,
        prompt_mask=real,
        position_ids=torch.arange(tokens).expand_as(ids),
    )


def built(granularity: str = "attn_sequence") -> Iterator[Engine]:
    topology = read_topology({})
    with process_group(topology, timeout=60):
        model = tiny_model()
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.o_proj.weight.mul_(4.0 if index == COSTLY else 0.2)
        config = RouterConfig(layers="1-4", granularity=granularity)
        routers = attach_routers(model, config, register=False)
        randomise(routers)
        yield Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), topology)


def said(engine: Engine, count: int) -> list[Batch | None]:
    """Return batches whose labels are what the unrouted model says: skipping costs there."""
    labelled: list[Batch | None] = []
    for one in map(batch, range(count)):
        with engine.routers.disabled(), torch.no_grad():
            logits = engine.module.model(one.input_ids).logits
        labels = torch.cat([one.labels[:, :1], logits[:, :-1].argmax(-1)], dim=1)
        labelled.append(dataclasses.replace(one, labels=labels))
    return labelled


@pytest.fixture
def engine() -> Iterator[Engine]:
    yield from built()


def test_lines_are_found_and_those_of_noise_are_flat() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 400, generator=generator, dtype=torch.float64) * 2 + 1
    noise = torch.randn(3, 400, generator=generator, dtype=torch.float64)
    lines = torch.tensor([[0.5], [0.0], [-0.5]], dtype=torch.float64)
    cost_model = SkipCostModel.fit(logits, lines * logits + 0.1 * noise + 3.0)
    assert cost_model.slope[0] == pytest.approx(0.5, abs=0.02)
    assert cost_model.intercept[0] == pytest.approx(3.0, abs=0.05)
    assert (cost_model.slope[1:] > 0).all()
    assert (cost_model.slope[1:] < 0.02).all()  # says nothing; says the opposite
    at = torch.full((3, 1), 0.4, dtype=torch.float64)
    assert cost_model.predict(at)[0].item() == pytest.approx(3.2, abs=0.05)
    flat = SkipCostModel.fit(logits, lines * logits + 0.1 * noise + 3.0, trust=0.0)
    assert (flat.slope > 0).all()
    assert (flat.slope < 0.02).all()
    assert flat.predict(at)[0].item() == pytest.approx(
        3.5, abs=0.05
    )  # the mean at the mean logit, 1


def test_a_cost_is_what_turning_the_decision_around_changes(engine: Engine) -> None:
    texts: list[Batch | None] = [batch(1, rows=3), batch(2, rows=2)]
    logits, costs = skip_costs(engine, texts)
    assert logits.shape == costs.shape == (4, 5)
    one = batch(1, rows=3)
    row = dataclasses.replace(
        one, **{name: getattr(one, name)[1:2] for name in ("input_ids", "labels", "token_mask")}
    )
    row = dataclasses.replace(row, prompt_mask=row.token_mask, position_ids=one.position_ids[:1])
    loss = {}
    for keep in (0.0, 1.0):
        with engine.routers.override({3: keep}), torch.no_grad():
            loss[keep] = float(engine._forward(row))
    assert costs[2, 1] == pytest.approx(loss[0.0] - loss[1.0], rel=1e-4, abs=1e-5)


def test_segments_of_a_packed_row_have_their_own_costs(engine: Engine) -> None:
    apart = batch(3, rows=2)
    segments = torch.arange(2).repeat_interleave(8)[None]
    labels = apart.labels.reshape(1, 16).clone()
    labels[0, 8] = -100  # the second segment's first token has nothing before it
    packed = Batch(
        input_ids=apart.input_ids.reshape(1, 16),
        labels=labels,
        token_mask=apart.token_mask.reshape(1, 16),
        prompt_mask=apart.prompt_mask.reshape(1, 16),
        position_ids=apart.position_ids.reshape(1, 16),
        segment_ids=segments,
    )
    for mine, theirs in zip(skip_costs(engine, [packed]), skip_costs(engine, [apart]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def as_it_is(engine: Engine, texts: list[Batch | None], capacity: float) -> tuple[Tensor, Tensor]:
    """Stand for a static drop: propose what the routers do already."""
    logits, _ = skip_costs(engine, texts)
    return logits, _shares_above(logits, engine.routers)


def test_layers_that_cost_more_keep_more_and_the_text_loses_less(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaskip.calibration.allocation._static_drop", as_it_is)
    texts = said(engine, 8)
    calibrate_threshold(engine, texts, capacity=0.5)
    level = engine.evaluate(texts, routed=True)
    kept = allocate(engine, texts, 0.5, rounds=2)
    found = engine.evaluate(texts, routed=True)
    assert kept == pytest.approx(0.5, abs=0.01)
    assert kept == found.capacity
    assert found.loss < level.loss - 0.05
    at = (1, 2, 3, 4).index(COSTLY)
    assert found.capacity_per_layer[at] > 0.95 > level.capacity_per_layer[at]


def test_routers_that_mislead_give_way_to_whole_layers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers cost nothing; trusted routers and the static drop say the opposite, so only whole
    layers by their costs find that."""

    def opposite(*given: Any) -> tuple[Tensor, Tensor]:
        logits, shares = _static_drop(*given)
        return logits, 1 - shares

    def fit(logits: Tensor, costs: Tensor, *, trust: float) -> SkipCostModel:
        return SkipCostModel.fit(logits, -costs if trust else costs, trust=trust)

    monkeypatch.setattr("megaskip.calibration.allocation.SkipCostModel", SimpleNamespace(fit=fit))
    monkeypatch.setattr("megaskip.calibration.allocation._static_drop", opposite)
    with torch.no_grad():
        for index in (1, 3):
            engine.module.model.model.layers[index].self_attn.o_proj.weight.zero_()
    texts = said(engine, 4)
    calibrate_threshold(engine, texts, capacity=0.5)
    allocate(engine, texts, 0.5, rounds=2)
    found = engine.evaluate(texts, routed=True)
    assert found.capacity_per_layer == pytest.approx((0.0, 1.0, 0.0, 1.0), abs=0.1)
    with engine.routers.disabled():
        assert engine.evaluate(texts, routed=True).loss == pytest.approx(found.loss, abs=0.01)


def test_what_is_tried_are_the_costliest_units_then_whole_layers_then_half_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Tensor] = []
    logits = torch.linspace(-1, 1, 100, dtype=torch.float64).repeat(4, 1)
    mean = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    costs = mean[:, None] + 2 * logits  # of each layer some units are worth more than the next's
    now = _shares_above(logits, engine.routers)

    def note(_: object, __: Tensor, shares: Tensor) -> None:
        tried.append(shares)

    monkeypatch.setattr("megaskip.calibration.allocation._static_drop", as_it_is)
    monkeypatch.setattr("megaskip.calibration.allocation._BestThresholds.consider", note)
    monkeypatch.setattr(
        "megaskip.calibration.allocation.skip_costs", lambda engine, texts: (logits, costs)
    )
    allocate(engine, [batch(1)], 0.5, rounds=2)
    bar = costs.flatten().median()
    units, layers = (costs > bar).double().mean(1), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = [units, layers, now + (units - now) / 2, now + (layers - now) / 2]
    for found, wanted in zip(tried[1:], expected, strict=True):  # after the static drop
        torch.testing.assert_close(found, wanted.double(), atol=0.011, rtol=0)


def test_a_start_that_keeps_too_much_is_not_the_best(engine: Engine) -> None:
    texts = said(engine, 4)
    kept = allocate(engine, texts, 0.375, rounds=1)  # nobody has put the threshold there
    assert kept == pytest.approx(0.375, abs=0.01)


def test_nothing_better_than_a_static_drop_leaves_the_static_drop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def useless(engine: Engine, texts: list[Batch | None]) -> tuple[Tensor, Tensor]:
        logits, costs = skip_costs(engine, texts)
        return logits, -costs

    monkeypatch.setattr("megaskip.calibration.allocation.skip_costs", useless)
    texts = said(engine, 4)
    calibrate_threshold(engine, texts, capacity=0.375)  # one layer and a half of four
    kept = allocate(engine, texts, 0.375, rounds=1)
    found = engine.evaluate(texts, routed=True)
    assert kept == found.capacity == pytest.approx(0.375, abs=0.01)
    similarity = mean_similarity(engine, texts)
    by_change = sorted(engine.routers.layers, key=similarity.__getitem__)
    share = dict(zip(engine.routers.layers, found.capacity_per_layer, strict=True))
    assert by_change[0] == COSTLY
    assert [share[layer] for layer in by_change] == pytest.approx([1, 0.5, 0, 0], abs=0.04)


def test_a_loss_that_is_lower_by_chance_is_not_lower() -> None:
    generator = torch.Generator().manual_seed(0)
    others = torch.randn(400, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    noise -= noise.mean()
    assert not _is_lower(others, others)
    assert not _is_lower(others + noise - 0.04, others)  # its standard error is 0.05
    assert _is_lower(others + noise - 0.06, others)


def test_what_does_not_lose_less_is_not_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = said(engine, 4)
    allocate(engine, texts, 0.5, rounds=2)
    best = engine.evaluate(texts, routed=True)
    before = engine.routers.config.threshold

    def reversed_costs(engine: Engine, texts: list[Batch | None]) -> tuple[Tensor, Tensor]:
        logits, costs = skip_costs(engine, texts)
        return logits, -costs

    monkeypatch.setattr("megaskip.calibration.allocation.skip_costs", reversed_costs)
    allocate(engine, texts, 0.5, rounds=2)
    assert engine.routers.config.threshold == before
    assert engine.evaluate(texts, routed=True) == best


def test_costs_are_measured_beside_what_was_found_for_the_next_capacity(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, seen = said(engine, 8), []

    def watched(engine: Engine, texts: list[Batch | None]) -> tuple[Tensor, Tensor]:
        seen.append(engine.routers.config.threshold)
        return skip_costs(engine, texts)

    monkeypatch.setattr("megaskip.calibration.allocation.skip_costs", watched)
    small, large = calibrate_all(engine, texts, texts, [0.5, 0.3], rounds=1).points
    assert (small.capacity, large.capacity) == (0.3, 0.5)
    _, beside = seen
    assert beside == large.threshold
    assert isinstance(beside, tuple)


def test_thresholds_by_layer_are_stored_exported_and_chosen(engine: Engine, tmp_path: Path) -> None:
    texts = said(engine, 8)
    points = calibrate_all(engine, texts, texts, [0.3, 0.5], rounds=2).points
    routers = engine.routers
    routers.configure(with_points(RouterConfig(layers="1-4"), points))
    folder = save_routers(tmp_path / "routers", routers)
    model = tiny_model()
    model.load_state_dict(engine.module.model.state_dict())
    loaded = load_routers(model, folder)
    assert loaded.config.calibrated == tuple((p.capacity, p.threshold) for p in points)
    exported = as_exported(model, loaded)
    for point in points:
        assert isinstance(point.threshold, tuple)
        loaded.set_capacity(point.capacity)
        assert loaded.config.threshold == point.threshold
        exported.set_capacity(point.capacity)
        kept = []
        for text in texts:
            assert text is not None
            exported(text.input_ids, attention_mask=text.token_mask.long(), use_cache=False)
            kept.append(exported.capacity())
        assert sum(kept) / len(kept) == pytest.approx(point.kept, abs=1e-6)


def test_a_wrong_number_of_thresholds_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold holds 3 numbers for 4 routed layers"):
        attach_routers(tiny_model(), RouterConfig(layers="1-4", threshold=(0.5, 0.5, 0.5)))
    with pytest.raises(ConfigError, match=r"--threshold 1 must lie inside"):
        RouterConfig(layers="1-4", threshold=(0.5, 1.0, 0.5, 0.5))


def test_decisions_per_token_are_refused() -> None:
    for engine in built("attn_token"):
        with pytest.raises(ConfigError, match="not for attn_token: calibrate without --allocate"):
            allocate(engine, [batch(1)], 0.5, rounds=1)
