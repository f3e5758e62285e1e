"""One set of routers serves many capacities: calibrated on text, stored, carried, chosen."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from routed_models import VOCABULARY, as_exported, randomise

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.arch.task_loss import TaskLoss
from megaskip.calibration.capacities import calibrate_all, reach_capacity, with_points
from megaskip.calibration.equal_scores import decide_as_before, give_directions
from megaskip.calibration.job import CalibrationJob
from megaskip.calibration.search import ThresholdSearch
from megaskip.calibration.threshold import calibrate_threshold, decide_all
from megaskip.checkpoint import describe_base
from megaskip.checkpoint.routers import read_router_config, update_router_config
from megaskip.config import RunConfig
from megaskip.config.commands.calibrate import CalibrateOptions
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.routing import SUBLAYER_GRANULARITIES
from megaskip.data import Batch
from megaskip.errors import ConfigError, MegaskipError
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import DEMO_FOLDER
from megaskip.parallel.topology import process_group, read_topology
from megaskip.routing import Counts, Measured, RouterSet
from megaskip.routing.any_budget import AnyBudget
from megaskip.routing.budget import Budget
from megaskip.routing.thresholds import Thresholds
from megaskip.runs.source import read_as


def batches(seed: int, count: int = 10) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (64, 8), generator=generator)
        real = torch.ones_like(ids, dtype=torch.bool)
        positions = torch.arange(8).expand_as(ids)
        made.append(
            Batch(
                input_ids=ids,
                labels=ids,
                token_mask=real,
                prompt_mask=real,
                position_ids=positions,
            )
        )
    return made


@pytest.fixture
def engine() -> Any:
    topology = read_topology({})
    with process_group(topology, timeout=60):
        yield engine_of()


def engine_of(granularity: str = "attn_sequence") -> Engine:
    model = tiny_model()
    config = RouterConfig(layers="1-4", granularity=granularity)
    routers = attach_routers(model, config, register=False)
    return Engine(TaskLoss(model, chunk_tokens=64), routers, RunConfig(), read_topology({}))


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
def test_a_calibrated_capacity_is_realised_on_other_text(engine: Engine, granularity: str) -> None:
    engine = engine_of(granularity)
    randomise(engine.routers)
    asked = [0.3, 0.7]
    points = calibrate_all(engine, batches(1), batches(2), asked).points
    engine.routers.config = with_points(engine.routers.config, points)
    for point, capacity in zip(points, asked, strict=True):
        assert point.kept == pytest.approx(capacity, abs=0.01)
        assert point.held_out == pytest.approx(capacity, abs=0.01 + 2 * point.held_out_error)
        engine.routers.set_capacity(capacity)
        again = engine.evaluate(batches(2), routed=True)
        assert again.capacity == pytest.approx(point.held_out, abs=1e-3)


@pytest.mark.parametrize("granularity", SUBLAYER_GRANULARITIES)
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_capacities_are_reached_with_equal_and_with_saturated_scores(
    engine: Engine, granularity: str, scale: float
) -> None:
    engine = engine_of(granularity)
    routers = engine.routers
    if scale:
        randomise(routers)
        with torch.no_grad():
            for parameter in routers.parameters():
                parameter.mul_(scale)
    before, text = routers.config, batches(1, 4)
    for capacity in (0.875, 0.4):
        routers.configure(before)
        kept, equal = reach_capacity(engine, text, capacity, rounds=8)
        assert kept == pytest.approx(capacity, abs=0.01)
        assert bool(equal) == (scale == 0 and capacity == 0.875)  # then they have a direction
        routers.configure(routers.settled_config())
        assert engine.evaluate(text, routed=True).capacity == pytest.approx(kept, abs=1e-3)


def test_a_direction_changes_nothing_at_the_thresholds_that_there_were() -> None:
    routers = attach_routers(tiny_model(), RouterConfig(layers="1-4", router="affine"))
    with torch.no_grad():
        routers.router(1).bias.fill_(0.3)
        routers.router(2).weight.fill_(0.1)
    config = RouterConfig(layers="1-4", threshold=0.55, calibrated=((0.9, 0.5),))
    logits = give_directions(routers)
    assert logits.keys() == {1, 3, 4} and all(
        routers.router(layer).weight.any() for layer in logits
    )
    assert not give_directions(routers)
    after = decide_as_before(config, routers.layers, logits)
    for old, new in [(config, after), (config.at_capacity(0.9), after.at_capacity(0.9))]:
        old_rule, new_rule = Thresholds(old, routers.layers), Thresholds(new, routers.layers)
        for layer in routers.layers:
            logit = torch.tensor([[logits.get(layer, 0.2)]])
            assert new_rule.keep(logit, layer) == old_rule.keep(logit, layer)


def test_scores_and_losses_that_are_not_finite_are_one_message(engine: Engine) -> None:
    """Every comparison with nan fails: the search would take it for a unit that is skipped."""
    randomise(engine.routers)
    text = batches(0, 1)
    norm = engine.model.get_parameter("model.norm.weight")
    norm.data[0] = torch.nan
    with pytest.raises(MegaskipError, match=r"held-out loss at capacity 0\.5: found nan or inf"):
        calibrate_all(engine, text, text, [0.5])
    with pytest.raises(MegaskipError, match="loss of the calibration text: found nan or inf"):
        calibrate_all(engine, text, text, [0.5], rounds=1)
    engine.model.get_parameter("model.layers.2.mlp.down_proj.weight").data[3, 3] = torch.nan
    with pytest.raises(MegaskipError, match="128 of 256 logits of the routers: found nan or inf"):
        calibrate_all(engine, text, text, [0.5])


def test_text_of_one_row_alone_reaches_all_or_nothing(engine: Engine) -> None:
    same = [
        dataclasses.replace(b, input_ids=torch.full_like(b.input_ids, 5)) for b in batches(1, 1)
    ]
    with pytest.raises(ConfigError, match=r"0.6 cannot be reached: .* too few different rows"):
        calibrate_all(engine, same, same, [0.6]).require_all()


def test_capacities_that_are_reached_are_not_lost_with_one_that_is_not(engine: Engine) -> None:
    randomise(engine.routers)
    other = [dataclasses.replace(b, input_ids=torch.full_like(b.input_ids, 5)) for b in batches(2)]
    result = calibrate_all(engine, batches(1), other, [0.45, 0.995])
    assert [point.capacity for point in result.points] == [0.995]
    (problem,) = result.problems
    assert problem.startswith("--capacity 0.45 does not hold")


def test_text_is_read_as_long_as_asked_else_as_the_run_read_it(tmp_path: Path) -> None:
    config = {"model": {"model": "demo"}, "data": {"data": ["demo"], "seq_length": 96}}
    (tmp_path / "report.json").write_text(json.dumps({"config": config}))
    named = RouterSource(routers=tmp_path), {"data": ("text.jsonl",)}
    trained: tuple[RouterSource, dict[str, Any]] = RouterSource(run=tmp_path), {}
    for (source, data), default in ((named, 512), (trained, 96)):
        lengths = [
            read_as(source, TextSource(**data, seq_length=asked), tmp_path)[0].seq_length
            for asked in (None, 128)
        ]
        assert lengths == [default, 128]


def test_text_of_another_kind_is_refused(engine: Engine) -> None:
    randomise(engine.routers)
    other = [dataclasses.replace(b, input_ids=torch.full_like(b.input_ids, 5)) for b in batches(2)]
    with pytest.raises(ConfigError, match="does not hold on other text"):
        calibrate_all(engine, batches(1), other, [0.45]).require_all()


def test_routers_that_decide_nothing_are_not_calibrated(tmp_path: Path) -> None:
    """Their thresholds do not count, so what is found would be ignored where they are loaded."""
    config = RouterConfig(layers="1-4", budget="static", compensation="bias")
    save_routers(tmp_path / "routers", attach_routers(tiny_model(), config))
    source = RouterSource(routers=tmp_path / "routers", base=str(DEMO_FOLDER / "backbone"))
    options = CalibrateOptions(source=source, capacity=(0.5,), text=TextSource(data=("demo",)))
    with pytest.raises(ConfigError, match=r"decide nothing: .* made with --budget static"):
        CalibrationJob(options, read_topology({}), shows_progress=False)


def calibrated() -> tuple[Any, RouterSet]:
    model = tiny_model()
    table = ((0.7, 0.4), (0.3, 0.6))
    routers = attach_routers(model, RouterConfig(layers="1-4", calibrated=table))
    randomise(routers)
    return model, routers


def test_the_table_survives_saving_and_old_folders_load(tmp_path: Path) -> None:
    model, routers = calibrated()
    folder = save_routers(tmp_path / "routers", routers, base=describe_base(model.config))
    assert read_router_config(folder)[0].calibrated == ((0.3, 0.6), (0.7, 0.4))
    update_router_config(folder, routers.config.at_capacity(0.3))
    loaded = load_routers(tiny_model(), folder)
    assert (loaded.config.capacity, loaded.config.threshold) == (0.3, 0.6)
    content = json.loads((folder / "router_config.json").read_text())
    for name in ("calibrated", "capacity_low"):
        del content[name]
    (folder / "router_config.json").write_text(json.dumps(content))
    assert read_router_config(folder)[0].calibrated == ()


def test_an_exported_model_changes_its_capacity_and_names_those_it_knows() -> None:
    model, routers = calibrated()
    exported = as_exported(model, routers)
    ids = torch.randint(3, VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(0))
    realised = []
    for capacity in (0.7, 0.3):
        exported.set_capacity(capacity)
        exported(ids)
        realised.append(exported.capacity())
        routers.set_capacity(capacity)
        model(ids)
        assert routers.capacity() == realised[-1]
    assert realised[0] > realised[1]
    assert exported.config.routing["capacity"] == 0.3
    with pytest.raises(ConfigError, match=r"0.5 is not calibrated \(calibrated: 0.3, 0.7\)"):
        exported.set_capacity(0.5)


def test_one_budget_follows_every_capacity_it_asks_for() -> None:
    budget = AnyBudget(asked=0.5, low=0.25, gain=0.1)
    normal = torch.distributions.Normal(0.0, 1.0)
    for _ in range(600):
        kept = float(1 - normal.cdf(torch.as_tensor(budget.offset)))
        budget.steer(Measured(capacity=kept, units=64.0, spread=1.0), None)
    for target in (0.3, 0.5, 0.75, 0.9):
        budget._aim(target)
        kept = float(1 - normal.cdf(torch.as_tensor(budget.offset)))
        assert kept == pytest.approx(target, abs=0.03)
    other = AnyBudget(asked=0.5, low=0.25, gain=0.1)
    other.restore(budget.state())
    assert other.settled_offset() == budget.settled_offset()
    assert other.state() == budget.state()


def test_one_budget_is_trained_for_less_than_it_will_be_asked() -> None:
    budget, targets = AnyBudget(asked=0.5, low=0.5, gain=0.1), []
    for _ in range(100):
        budget.steer(Measured(capacity=0.5, units=64.0, spread=1.0), None)
        targets.append(budget.target)
    assert min(targets) == pytest.approx(0.2, abs=0.02)
    assert max(targets) == pytest.approx(1.0, abs=0.02)


def test_held_out_decisions_are_those_of_the_asked_capacity(engine: Engine) -> None:
    routers = engine.routers
    randomise(routers)
    routers.configure(dataclasses.replace(routers.config, capacity=0.5, capacity_low=0.25))
    for _ in range(7):  # the next step would ask for another capacity
        engine.evaluate(batches(1), routed=True)
        routers.steer()
    found = engine.evaluate(batches(2), routed=True)
    aimed = routers.steering.budget.offset
    routers.configure(dataclasses.replace(routers.settled_config(), capacity_low=None))
    assert aimed != 0.0
    assert engine.evaluate(batches(2), routed=True) == found


def test_a_layer_that_keeps_more_than_the_others_pays_the_same_price() -> None:
    budget = Budget(target=0.5, gain=0.1)
    by_layer = torch.tensor([[9.0, 3.0], [10.0, 10.0], [0.0, 0.0], [5.0, 5.0]])
    counts = Counts.unpack(by_layer.double().flatten())
    budget.steer(Measured.of(counts), None)
    kept = torch.tensor([9.0, 3.0], requires_grad=True)
    budget.penalty(kept, torch.tensor([10.0, 10.0]), 20.0).backward()
    assert kept.grad is not None
    assert (20 * kept.grad).tolist() == pytest.approx([float(budget.price)] * 2)
    assert float(budget.price) > 0
    other = Budget(target=0.5, gain=0.1)
    other.restore(budget.state())
    assert other.penalty(kept, kept, 20.0) == budget.penalty(kept, kept, 20.0)
    assert other.penalty(kept, kept, 20.0).dtype == torch.float32


def test_steering_on_the_device_is_that_of_plain_numbers() -> None:
    """The rule of Budget's docstring, written with floats; only the last bit of a root differs."""
    budget, position, spread = Budget(target=0.5, gain=0.1), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 20):
        units = torch.randint(0, 30, (5,), generator=generator).double()
        kept = (units * torch.rand(5, generator=generator)).floor()
        logits = units * torch.randn(5, generator=generator).double()
        counts = Counts(kept=kept, units=units, logits=logits, squares=logits.square() + units)
        budget.steer(Measured.of(counts), step / 20)
        total, target = sum(units.tolist()), 1 - 0.5 * min(step / 20 / 0.2, 1.0)
        variance = sum(counts.squares.tolist()) / total - (sum(logits.tolist()) / total) ** 2
        memory = 0.9 if spread else 0.0
        spread = math.sqrt(memory * spread**2 + (1 - memory) * variance)
        error = sum(kept.tolist()) / total - target
        position += max(1 - step / 20, 0.05) * min(total / 64, 1.0) * error
        assert budget.offset.dtype == torch.float64  # type: ignore[union-attr]
        assert float(budget.offset) == pytest.approx(position * spread, rel=1e-13)
        assert float(budget.price) == pytest.approx(0.1 * (position + error), rel=1e-13)


@pytest.mark.parametrize("feedback", [-0.8, -0.3, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("target", [0.1, 0.45, 0.9])
def test_the_search_finds_the_capacity_when_layers_hear_each_other(
    feedback: float, target: float
) -> None:
    """Logits lie in [0, 1], and move by `feedback` for each unit that is skipped."""
    search, position = ThresholdSearch(target), 0.0
    for _ in range(7):
        moved = feedback * position / (1 + abs(feedback))
        kept = min(max(1 - position + moved, 0.0), 1.0)
        search.note(position, kept)
        if search.distance <= 0.002:
            break
        position = search.next(1 - target + moved)
    assert search.distance <= 0.002
    assert abs(1 - search.best * (1 - feedback / (1 + abs(feedback))) - target) <= 0.002


def test_a_capacity_that_falls_off_a_cliff_is_found_by_narrowing() -> None:
    """24 of 28 layers score alike to a thousandth, and all hear what is skipped."""
    generator = torch.Generator().manual_seed(0)
    alone = torch.cat([torch.full((40,), -60.0), 1e-3 * torch.randn(240, generator=generator)])

    def measure(position: float) -> tuple[float, list[float]]:
        kept, logits = 1.0, alone
        for _ in range(100):
            logits = alone - 20 * (1 - kept)
            kept = float((logits >= position).double().mean())
        return kept, logits.sort().values.tolist()

    search, position = ThresholdSearch(0.866), 0.0
    for _ in range(7):
        kept, logits = measure(position)
        search.note(position, kept)
        position = search.next(logits[round(0.134 * len(logits))])
    tried = len(search._tried)
    while (narrower := search.narrow(logits)) is not None and search.distance > 0.01:
        kept, logits = measure(narrower)
        search.note(narrower, kept)
    assert search.distance <= 0.01
    assert len(search._tried) - tried <= 16


def test_the_search_narrows_down_a_step() -> None:
    search, position = ThresholdSearch(0.5), 0.0
    for _ in range(12):
        search.note(position, 1.0 if position < 0.3 else 0.0)
        position = search.next(0.9)
    assert position == pytest.approx(0.3, abs=0.01)


def test_very_many_logits_are_sampled_and_the_capacity_is_hit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaskip.calibration.threshold._ENOUGH", 500)
    randomise(engine.routers)
    _, above = decide_all(engine, batches(1))
    assert len(above) <= 500 < 640 * 3
    assert calibrate_threshold(engine, batches(1), capacity=0.4) == pytest.approx(0.4, abs=0.005)
