"""Routers in closed form: what skipping costs, measured by gradients and regressed on states."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import tiny_model
from test_fit import Killed, batches, killed_after, kl_to_dense, overflowing
from torch import Tensor

from megaskip import RouterConfig, attach_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration import cost_regression, router_fit_job
from megaskip.calibration.allocation import UnreachedError
from megaskip.calibration.capacities import CalibrationResult, calibrate_all
from megaskip.calibration.cost_regression import CostRegression
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.router_fit import fit_routers, split_off
from megaskip.calibration.router_fit_job import fit_routers_job
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.calibration.unit_costs import deal_groups, measure_costs, points_on_the_way
from megaskip.config import SUBLAYER_GRANULARITIES, RunConfig
from megaskip.config.commands.fit import TextAndModel
from megaskip.config.commands.fit_routers import FitRoutersOptions
from megaskip.errors import CheckpointError, ConfigError, MegaskipError
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import process_group, read_topology


@pytest.fixture
def make_engine() -> Iterator[Any]:
    topology = read_topology({})

    def make(**settings: Any) -> Engine:
        model = tiny_model("llama")
        config = RouterConfig(**{"layers": "1-4", "router": "affine", **settings})
        routers = attach_routers(model, config, register=False)
        return Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), topology)

    with process_group(topology, timeout=60):
        yield make


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_gradients_along_the_way_add_up_to_what_skipping_costs(
    make_engine: Any, granularity: str
) -> None:
    engine = make_engine(granularity=granularity)
    text, group = batches(1, padding=3), [1, 3]
    points, weights = numpy.polynomial.legendre.leggauss(16)
    costs = 0.0
    for batch in text:
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            at = torch.full((16, 1), float(point))
            ((_, gradients),) = engine.gate_gradients(batch, [group], at=at, distill=0.0)
            assert list(gradients) == group
            costs -= weight * sum(float(gradient.sum()) for gradient in gradients.values())
    with engine.routers.disabled():
        dense = engine.evaluate(text, routed=True).loss
        with engine.routers.override(dict.fromkeys(group, 0.0)):
            skipped = engine.evaluate(text, routed=True).loss
    supervised = sum(batch.counts.supervised for batch in text)
    assert costs == pytest.approx(supervised * (skipped - dense), rel=0.02)


def test_costs_are_told_of_real_units_with_what_their_router_reads(make_engine: Any) -> None:
    engine = make_engine(granularity="mlp_token")
    (batch,) = batches(1, padding=3)
    told: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, read: Tensor, costs: Tensor) -> None:
        told[layer] = read, costs

    measure_costs(engine, batch, [[1, 3], [2]], observe, distill=0.0, seed=5)
    at = points_on_the_way(16, 5)
    assert ((at * 16).long().sort(dim=0).values[:, 0] == torch.arange(16)).all()
    ((_, gradients),) = engine.gate_gradients(batch, [[2]], at=at, distill=0.0)
    read, costs = told[2]
    assert set(told) == {1, 2, 3}
    assert torch.equal(costs, -gradients[2][:, :12].flatten())
    assert read.shape == (16 * 12, engine.routers.hidden_size)
    predicted = engine.routers.router(2)(read)  # a fresh router says 0 of everything
    assert torch.equal(predicted, torch.zeros(16 * 12))


def test_groups_hold_every_layer_once_and_differ_by_batch() -> None:
    layers = range(10)
    dealt = [deal_groups(layers, 4, seed) for seed in range(3)]
    assert all(sorted(sum(groups, [])) == list(layers) for groups in dealt)
    assert dealt[0] != dealt[1] and deal_groups(layers, 4, 0) == dealt[0]
    assert len(deal_groups(range(2), 4, 0)) == 2


def rows(count: int, noise: float, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator) @ torch.randn(6, width, generator=generator)
    weight = torch.randn(width, generator=generator)
    y = x @ weight + 3 + noise * torch.randn(count, generator=generator)
    return x, y, x @ weight + 3


@pytest.mark.parametrize("features", [1024, 12])
def test_a_linear_cost_is_found_again(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_regression, "_MOST_FEATURES", features)
    x, y, truth = rows(400, noise=0.1)
    fit = CostRegression(24)
    if fit.needs_features:
        fit.sketch(x[:100])
        fit.choose_features(lambda total: None)
    fit.observe(x[:200], y[:200], half=0)
    fit.observe(x[200:], y[200:], half=1)
    cost = fit.solve(lambda total: None)
    predicted = x.double() @ cost.weight + cost.bias
    assert torch.allclose(predicted, truth.double(), atol=0.3)
    assert cost.explained > 0.99
    assert cost.mean == pytest.approx(float(y.mean()), abs=1e-5)
    assert cost.spread == pytest.approx(float(predicted.std(correction=0)), rel=1e-4)


def test_what_is_alike_in_all_rows_predicts_nothing_and_is_predicted() -> None:
    x, y, _ = rows(200, noise=0.0)
    alike = torch.full((100,), 3.7)
    for inputs, costs in ((x, torch.cat([alike, alike])), (torch.full_like(x, 3.7), y)):
        fit = CostRegression(24)
        fit.observe(inputs[:100], costs[:100], half=0)
        fit.observe(inputs[100:], costs[100:], half=1)
        cost = fit.solve(lambda total: None)
        assert cost.bias == pytest.approx(float(costs.mean()), abs=1e-2)
        assert max(float(cost.weight.abs().max()), cost.spread) < 1e-2 and cost.explained <= 1
    fit = CostRegression(24)
    fit.observe(x, y, half=0)
    with pytest.raises(ConfigError, match="all text that routers are fitted on is in one half"):
        fit.solve(lambda total: None)


def test_noise_is_not_learnt() -> None:
    x, y, truth = rows(200, noise=0.0)
    y = torch.randn(200, generator=torch.Generator().manual_seed(1)) * 10
    fit = CostRegression(24)
    fit.observe(x[:100], y[:100], half=0)
    fit.observe(x[100:], y[100:], half=1)
    cost = fit.solve(lambda total: None)
    assert abs(cost.explained) < 0.05 and cost.spread < 0.1 * float(y.std())


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_fitted_routers_skip_what_costs_little(make_engine: Any, granularity: str) -> None:
    engine = make_engine(granularity=granularity)
    routers, text = engine.routers, batches(8)
    fitted = fit_routers(engine, text, groups=2)
    assert set(fitted) == set(routers.layers)
    assert all(not parameter.grad.any() for parameter in engine.parameters.values())
    lost = {}
    for sign in (1, -1):
        with torch.no_grad():
            for layer in routers.layers:
                routers.router(layer).weight.mul_(sign)
                routers.router(layer).bias.mul_(sign)
        routers.configure(routers.config)
        kept = calibrate_threshold(engine, text, capacity=0.5, rounds=6)
        assert kept == pytest.approx(0.5, abs=0.02)
        lost[sign] = kl_to_dense(engine, text)
    assert lost[1] < 0.9 * lost[-1]


def test_a_rank_without_text_of_its_own_adds_nothing(make_engine: Any) -> None:
    text = batches(4)
    alone, beside = make_engine(granularity="mlp_token"), make_engine(granularity="mlp_token")
    fit_routers(alone, text, groups=2)
    fit_routers(beside, [*text, None, None], groups=2)
    for name, tensor in alone.routers.state_dict().items():
        assert torch.equal(tensor, beside.routers.state_dict()[name]), name


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.0, 0), (0.99, 7)])
def test_text_is_split_from_all_over_it(share: float, count: int) -> None:
    text = batches(8)
    first, others = split_off(text, share)
    assert len(first) == count and len(others) == 8 - count
    assert {id(batch) for batch in (*first, *others)} == {id(batch) for batch in text}
    assert share != 0.25 or [id(batch) for batch in first] == [id(text[3]), id(text[7])]


def test_routers_that_cannot_predict_costs_are_refused(make_engine: Any) -> None:
    with pytest.raises(ConfigError, match="take affine"):
        fit_routers(make_engine(router="linear"), batches(4), groups=2)
    with pytest.raises(ConfigError, match="too little"):
        fit_routers(make_engine(), batches(1), groups=2)
    with pytest.raises(MegaskipError, match="what skipping layer 1 costs: found nan or inf"):
        fit_routers(overflowing(make_engine()), batches(2), groups=1)


def test_a_fit_that_was_killed_goes_on_and_ends_with_the_same_bits(
    make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_regression, "_MOST_FEATURES", 12)
    monkeypatch.setattr("megaskip.calibration.router_fit.SAVED_EVERY", 2)
    file, text, said = tmp_path / "out.partial.safetensors", batches(5), []

    def fitted(calls: int) -> tuple[Any, dict[str, Tensor]]:
        engine = make_engine(granularity="mlp_token", compensation="low_rank")
        progress = FitProgress(file, {}, read_topology({}))
        said.append((list(progress.results), progress.batches))
        fit_compensation(engine, text, progress=progress)
        killed = killed_after(calls)
        costs = fit_routers(engine, text, groups=2, check=killed, progress=progress)
        return {n: (c.mean, c.explained) for n, c in costs.items()}, engine.routers.state_dict()

    expected, whole = fitted(99)
    file.unlink()
    for calls in (3, 2):
        with pytest.raises(Killed):
            fitted(calls)
    for calls in (1, 0):  # the second time all is done
        costs, weights = fitted(calls)
        assert costs == expected
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    assert said[2:] == [(["maps"], 2), (["maps"], 4), (["maps", "costs"], 0)]


def test_too_little_text_for_costs_is_said_before_maps_are_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_fit_job, "fit_compensation", None)
    text = TextAndModel(model="demo", data=("demo",), seq_length=32, held_out=8, micro_batch_size=2)
    options = FitRoutersOptions(base=text, layers="1,2", cost_rows=1, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="0 batch of text is too little to fit routers on"):
        fit_routers_job(options)


def test_a_job_that_was_killed_between_capacities_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextAndModel(model="demo", data=("demo",), seq_length=32, held_out=8, micro_batch_size=2)
    options = FitRoutersOptions(
        base=text,
        layers="1,2",
        capacity=(0.5, 0.75),
        compensation="bias",
        rows=16,
        cost_rows=16,
        groups=1,
        output=tmp_path / "whole",
    )
    with pytest.raises(UnreachedError, match="--capacity 0.75 does not hold") as of_whole:
        fit_routers_job(options)
    begun: list[float] = []

    def killed(*args: Any, **settings: Any) -> CalibrationResult:
        begun.extend(args[3])
        if len(begun) == 2:
            raise Killed
        return calibrate_all(*args, **settings)

    monkeypatch.setattr(router_fit_job, "calibrate_all", killed)
    options = dataclasses.replace(options, output=tmp_path / "again")
    with pytest.raises(Killed):
        fit_routers_job(options)
    with pytest.raises(CheckpointError, match="is of a fit with other flags"):
        fit_routers_job(dataclasses.replace(options, groups=2))
    with pytest.raises(UnreachedError) as of_both:
        fit_routers_job(options)
    assert str(of_both.value) == str(of_whole.value)
    assert begun == [0.75, 0.5, 0.5]
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again"}
