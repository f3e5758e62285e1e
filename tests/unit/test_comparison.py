"""A comparison puts every method at the same skip and pairs it with the dense model by document."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import transformers
from filelock import FileLock
from routed_models import randomise

from megaskip import RouterConfig, attach_routers, load_routers, save_routers
from megaskip.arch.adapters import add_adapters, make_adapters
from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.routers import fill_routers, read_router_config
from megaskip.cli.compare import parse
from megaskip.config import AdapterConfig, DataConfig, ModelConfig, OptimConfig, RunConfig
from megaskip.config.cli import parse_run_config
from megaskip.config.commands.compare import BASELINES
from megaskip.errors import CheckpointError, ConfigError, DataError
from megaskip.parallel.loading.source import DEMO_FOLDER, resolve_source
from megaskip.parallel.topology import process_group, read_topology
from megaskip.routing import RouterSet
from megaskip.study.agreement import Continuations
from megaskip.study.comparison import Comparison
from megaskip.study.cost_routers import CostRouters
from megaskip.study.ledger import Job, Ledger, share_of
from megaskip.study.measured import Measured
from megaskip.study.over_seeds import contrasts
from megaskip.study.page import page
from megaskip.study.pareto import HEADER, Contrast, draw, draw_layers, markdown, table_rows
from megaskip.study.recipes import Training, train_flags, training_of
from megaskip.study.scoring import short_names, spread_documents
from megaskip.study.static_drops import StaticDrops, map_parameters
from megaskip.study.training_costs import COST, cost_of, count_flops, over_control

DOCUMENTS = 24
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def comparison() -> Iterator[Comparison]:
    config = RunConfig(
        model=ModelConfig(model="demo", dtype="float32"),
        router=RouterConfig(layers="1-7"),
        data=DataConfig(
            data=(str(DEMO_FOLDER / "instruct.jsonl"),), held_out=DOCUMENTS, seq_length=128
        ),
        optim=OptimConfig(calibration_rows=64),
    )
    topology = read_topology({})
    with process_group(topology, timeout=60):
        yield Comparison(config, topology, resolve_source(config.model), cost_rows=32)


def test_baselines_skip_exactly_what_is_asked(comparison: Comparison) -> None:
    dense = comparison.measure(comparison.everything)
    assert dense.text.kept.all()
    assert comparison.orders([0]).keys() == set(BASELINES)
    for name, (order, *_) in comparison.orders([0]).items():
        found = comparison.measure(comparison.policy(order, 0.25))
        point = comparison.point(name, 0.25, [found], dense)
        assert point.skipped == pytest.approx(0.25)
        assert sum(point.skipped_by_layer.values()) == pytest.approx(0.25 * comparison.depth)
        assert point.loss_gap.value == pytest.approx(point.loss - dense.text.loss(), abs=1e-9)
        assert point.loss_gap.value > 0
        assert 0.9 < point.flops < 1


def test_a_comparison_with_itself_is_nothing(comparison: Comparison) -> None:
    (order,) = comparison.orders([0])["static"]
    found = comparison.measure(comparison.policy(order, 0.5))
    dense = comparison.measure(comparison.everything)
    rows = contrasts(
        {("ours", 0.5): [found], ("static", 0.5): [found], ("none", 0.5): [dense]}, "ours"
    )
    same, worse = rows
    assert (same.loss.low, same.loss.high, same.exact.value) == (0, 0, 0)
    assert worse.against == "none"
    assert worse.loss.low > 0
    assert "ours - none at 50.0%: loss +" in str(worse)


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_trained_routers_are_put_at_the_skip(
    comparison: Comparison, router: str, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    # Trained for another capacity, and for many.
    config = RouterConfig(layers="1-7", router=router, capacity=0.9, capacity_low=0.2)
    routers = attach_routers(model, config)
    randomise(routers)
    save_routers(tmp_path / "routers", routers)
    kept = comparison.take(tmp_path / "routers", 0.375)
    assert kept == pytest.approx(1 - 0.375 * 8 / 7, abs=0.02)
    found = comparison.measure(None)
    point = comparison.point(
        "ours", 0.375, [found, found], comparison.measure(comparison.everything)
    )
    assert point.seeds == 2
    assert point.skipped == pytest.approx(0.375, abs=0.1)
    picture = comparison.picture("what ran")
    np.testing.assert_array_equal(picture.ran[:, 0], found.text.kept[:, 0] > 0)
    contrast = Contrast(
        method="ours",
        against="<none>",
        skip=0.375,
        loss=point.loss_gap,
        pairs=point.pairs_gap,
        choice=point.choice_gap,
        exact=point.exact_gap,
    )
    html = page([point], [contrast], ["<b> & co"], title="a < b", settings=[("data", "<x>")])
    assert "ours - &lt;none&gt;" in html and "&lt;b&gt; &amp; co" in html and "a &lt; b" in html
    assert "http" not in re.sub(r'base64,[^"]*', "", html) and "<x>" not in html
    assert html.count("<figure>") == 3  # FLOPs, keys and values, layers
    for name in ("pareto", "layers"):
        (draw if name == "pareto" else draw_layers)([point], tmp_path / f"{name}.png", title="t")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "37.5%" in markdown(HEADER, table_rows([point]))


def test_allocated_routers_are_put_at_the_skip_layer_by_layer(
    comparison: Comparison, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    routers = attach_routers(model, RouterConfig(layers="1-7"))
    randomise(routers)
    save_routers(tmp_path / "routers", routers)
    comparison.take(tmp_path / "routers", 0.25)
    alike = comparison.measure(None)
    kept = comparison.take(tmp_path / "routers", 0.25, rounds=1)
    assert kept == pytest.approx(1 - 0.25 * 8 / 7, abs=0.01)
    assert isinstance(comparison.routers.config.threshold, tuple)
    assert comparison.measure(None).text.loss() < alike.text.loss() - 0.01


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """Return routers that give every unit the same score: they keep everything or nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    routers = attach_routers(model, RouterConfig(layers="1-7", threshold=0.4))
    return save_routers(tmp_path / "routers", routers)


def test_whole_layers_are_dropped_without_any_router(
    comparison: Comparison, untrained: Path
) -> None:
    assert comparison.take(untrained, 0.25, rounds=1) == pytest.approx(5 / 7)


def test_what_cannot_be_compared_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be reached by 7 routed layers of 8"):
        comparison.share(0.9)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    save_routers(tmp_path / "routers", attach_routers(model, RouterConfig(layers="4-6")))
    with pytest.raises(ConfigError, match="routes layers"):
        comparison.take(tmp_path / "routers", 0.25)


def test_the_one_that_others_are_set_against_is_among_them() -> None:
    usual = ["--model", "m", "--data", "d", "--output", "o", "--methods", "static,random"]
    assert parse(usual).ours == "ours"
    with pytest.raises(ConfigError, match="--pairs 0 must be at least 1"):
        parse([*usual, "--pairs", "0"])
    with pytest.raises(ConfigError, match="--ours allocated is not among --methods"):
        parse([*usual, "--ours", "allocated"])
    with pytest.raises(ConfigError, match="--seeds names 1 more than once") as refused:
        parse([*usual, "--seeds", "1,0,1", "--skip", "25,25.0"])
    assert "--skip names 25.0 more than once" in str(refused.value)


def test_thresholds_by_layer_are_refused_for_tokens_before_anything_is_trained() -> None:
    argv = ["--model", "m", "--data", "d", "--output", "o", "--methods", "ours,allocated"]
    assert parse([*argv, "--granularity", "block_sequence"]).granularity == "block_sequence"
    with pytest.raises(ConfigError, match="allocated does not go with --granularity mlp_token"):
        parse([*argv, "--granularity", "mlp_token"])


def test_documents_come_from_all_over_the_held_out_text() -> None:
    assert spread_documents(list(range(10)), 3) == [0, 3, 6]
    assert spread_documents(list(range(4)), 8) == [0, 1, 2, 3]
    assert spread_documents(list(range(7)), 4) == [0, 1, 3, 5]  # not the first four
    assert spread_documents([], 8) == []


def test_as_many_documents_are_measured_as_are_asked(comparison: Comparison) -> None:
    assert len(comparison.measure(comparison.everything).text.nll) == DOCUMENTS


@pytest.fixture
def drops(comparison: Comparison) -> StaticDrops:
    return StaticDrops(comparison, most=0.5, rank=16, order_rows=32)


def test_a_greedy_drop_loses_no_more_than_one_by_cosine_on_the_text_it_was_chosen_on(
    comparison: Comparison, drops: StaticDrops
) -> None:
    losses = {}
    for kind in ("cosine", "greedy"):
        layers = drops.order(kind, with_maps=False)[:2]
        drops.put(with_maps=False)
        routers = comparison.routers
        with routers.disabled(), routers.override(dict.fromkeys(layers, 0.0)):
            losses[kind] = comparison.engine.evaluate(
                comparison.some_calibration(32), routed=True
            ).loss
    assert losses["greedy"] <= losses["cosine"] + 1e-6


def test_a_fraction_of_a_layer_is_skipped_by_greedy_drops_too(comparison: Comparison) -> None:
    """3.2 layers of 8: a fifth of the documents skip a fourth one."""
    drops = StaticDrops(comparison, most=0.4, rank=16, order_rows=16)
    dense = comparison.measure(comparison.everything)
    measured = comparison.measure(drops.policy("greedy", 0.4))
    assert comparison.point("greedy", 0.4, [measured], dense).skipped == pytest.approx(
        0.4, abs=0.01
    )


def test_maps_in_closed_form_lose_less_than_zeros(
    comparison: Comparison, drops: StaticDrops
) -> None:
    dense = comparison.measure(comparison.everything)
    losses = {
        method: comparison.measure(drops.policy(method, 0.375)).text.loss()
        for method in ("static", "static_fitted")
    }
    assert dense.text.loss() < losses["static_fitted"] < losses["static"]


def test_trained_maps_start_where_the_closed_form_ends(
    comparison: Comparison, drops: StaticDrops, tmp_path: Path
) -> None:
    base = resolve_source(ModelConfig(model="demo")).describe()
    folder = drops.write_start("greedy_trained", 0.25, tmp_path / "start", base)
    fitted = comparison.measure(drops.policy("greedy_fitted", 0.25)).text
    # A run is measured with maps of its own rank, whatever is asked of others.
    for takes in (drops, StaticDrops(comparison, most=0.5, rank=2, order_rows=32)):
        taken = comparison.measure(takes.take(folder)).text
        np.testing.assert_allclose(taken.nll, fitted.nll, rtol=1e-5)
        np.testing.assert_array_equal(taken.kept, fitted.kept)


@pytest.mark.parametrize(("granularity", "layer"), [("mlp_sequence", 1), ("attn_sequence", 0)])
def test_a_run_that_drops_something_else_is_refused(
    comparison: Comparison, drops: StaticDrops, tmp_path: Path, granularity: str, layer: int
) -> None:
    """Its layers would all run, and it would be as good as the dense model."""
    config = RouterConfig(granularity=granularity, layers=(layer,), budget="static")
    routers = RouterSet(config, (layer,), comparison.routers.hidden_size)
    save_routers(tmp_path / "routers", routers)
    with pytest.raises(ConfigError, match=f"drops {granularity} of layers .{layer},., the compar"):
        drops.take(tmp_path / "routers")


def test_routers_by_cost_are_fitted_once_and_put_at_the_skip(
    comparison: Comparison, tmp_path: Path
) -> None:
    base = resolve_source(ModelConfig(model="demo", dtype="float32")).describe()
    fitted = CostRouters(comparison, base, tmp_path, rank=4, groups=4)
    run = fitted.run("by_cost_fitted", 0)
    written = (run / "routers" / "routers.safetensors").stat().st_mtime_ns
    assert fitted.run("by_cost_fitted", 0) == run
    assert (run / "routers" / "routers.safetensors").stat().st_mtime_ns == written
    kept = comparison.take(run / "routers", 0.25)
    assert kept == pytest.approx(1 - comparison.share(0.25), abs=0.01)
    assert comparison.routers.config.compensation == "low_rank"
    # What a training starts from skips as much at its own threshold.
    fitted.write_start("by_cost_trained", 0.25, 0, tmp_path / "start")
    assert (run / "routers" / "routers.safetensors").stat().st_mtime_ns == written
    comparison.attach(read_router_config(tmp_path / "start")[0])
    fill_routers(tmp_path / "start", comparison.routers)
    capacity = comparison.engine.evaluate(comparison.calibration, routed=True).capacity
    assert capacity == pytest.approx(kept, abs=1e-6)


def test_a_rank_waits_for_routers_that_another_one_fits(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve_source(ModelConfig(model="demo", dtype="float32")).describe()
    waiting = CostRouters(comparison, base, tmp_path, rank=4, groups=4)
    monkeypatch.setattr(CostRouters, "_fit", None)
    run = tmp_path / "by_cost-low_rank-s0"
    run.mkdir()
    with ThreadPoolExecutor() as pool:
        with FileLock(run / "fit.lock"):  # the other rank's
            found = pool.submit(waiting.run, "by_cost_fitted", 0)
            assert not wait([found], timeout=0.3).done
            save_routers(run / "routers", comparison.routers, base=base)
        assert found.result(timeout=30) == run


@pytest.mark.parametrize(
    ("method", "without_adapters"),
    [("static_lora", "static"), ("greedy_trained_lora", "greedy_fitted")],
)
def test_adapters_are_measured_with_their_run_and_with_no_other(
    comparison: Comparison, drops: StaticDrops, tmp_path: Path, method: str, without_adapters: str
) -> None:
    base = resolve_source(ModelConfig(model="demo")).describe()
    start = drops.write_start(method, 0.25, tmp_path / "start", base)
    plain = comparison.measure(drops.policy(without_adapters, 0.25)).text
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "backbone")
    routers = load_routers(model, start)
    add_adapters(model, routers, model, RunConfig(adapter=AdapterConfig(lora_rank=2)))
    for weight, equal in ((0.0, True), (0.01, False)):
        for name, tensor in routers.adapters.tensors().items():
            if "lora_B" in name:
                tensor.data.fill_(weight)
        save_routers(tmp_path / "run", routers, base=base)
        taken = comparison.measure(drops.take(tmp_path / "run")).text
        assert np.allclose(taken.nll, plain.nll, rtol=1e-5) == equal
        np.testing.assert_array_equal(taken.kept, plain.kept)
    again = comparison.measure(drops.policy(without_adapters, 0.25)).text
    np.testing.assert_array_equal(again.nll, plain.nll)


def test_what_was_measured_stays_with_what_it_depends_on(
    comparison: Comparison, tmp_path: Path
) -> None:
    training = Training(folder=tmp_path / "run", flags=())
    routed = Job(method="ours", skip=0.25, seed=1, training=training)
    plain = Job(method="static", skip=0.25, seed=None, training=None)
    ledger = Ledger(tmp_path / "measured", {"rows": 8})
    measured = comparison.measure(comparison.everything)
    assert ledger.read(plain) is None
    ledger.write(plain, measured)
    ledger.write(routed, "why not")
    stored = ledger.read(plain)
    assert isinstance(stored, Measured)
    np.testing.assert_equal(stored.to_arrays(), measured.to_arrays())
    assert ledger.read(routed) == "why not"
    assert Ledger(tmp_path / "measured", {"rows": 9}).read(plain) is None
    training.folder.mkdir()
    (training.folder / "report.json").write_text("{}")  # trained again
    assert ledger.read(routed) is None
    (tmp_path / "measured" / f"{plain.name}.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is damaged"):
        ledger.read(plain)


def test_another_right_answer_is_another_measurement(
    comparison: Comparison, tmp_path: Path
) -> None:
    keys = set()
    for name, gold in (("a", 0), ("a", 1), ("b", 0)):
        row = {"query": "Say yes.", "choices": ["yes", "no"], "gold": gold}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
        comparison.add_choices([tmp_path / f"{name}.jsonl"], 1)
        keys.add(comparison.fingerprint())
        comparison._yardstick.questions.clear()
    assert len(keys) == 3


def test_what_has_nothing_to_measure_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--continuations: no row .* has the 32 tokens"):
        Continuations(comparison.model, comparison.routers, [], count=2, tokens=4)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="files have no rows"):
        comparison.add_pairs(tmp_path, 2)


def test_sources_that_are_called_alike_stay_apart() -> None:
    assert short_names(["de/t.jsonl", "en/t.jsonl", "x/u.jsonl"]) == [
        *("de/t.jsonl", "en/t.jsonl", "u.jsonl")
    ]


def test_ranks_share_out_runs_not_measurements() -> None:
    def job(method: str, skip: float, folder: str | None) -> Job:
        training = None if folder is None else Training(folder=Path(folder), flags=())
        return Job(method=method, skip=skip, seed=0, training=training)

    jobs = [
        *(job("ours", 0.1, "r"), job("static", 0.1, None), job("ours", 0.2, "r")),
        *(job("allocated", 0.1, "r"), job("separate", 0.1, "s"), job("static", 0.2, None)),
    ]
    shares = [share_of(jobs, rank, 3) for rank in range(3)]
    assert sorted(job.name for share in shares for job in share) == sorted(j.name for j in jobs)
    assert shares[0] == [jobs[0], jobs[2], jobs[3], jobs[5]]
    assert share_of(jobs, 0, 1) == jobs


@pytest.mark.parametrize(
    ("granularity", "targets"), [("attn_sequence", "attn"), ("block_token", "all")]
)
def test_the_dense_control_trains_as_many_parameters_as_the_maps_have(
    comparison: Comparison,
    granularity: str,
    targets: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = dataclasses.replace(comparison.plain, granularity=granularity)
    monkeypatch.setattr(Comparison, "plain", plain)
    options = parse(
        ["--model", "demo", "--data", "demo", "--output", str(tmp_path), "--layers", "1-7"]
    )
    training = training_of("dense_adapted", 0.25, 0, comparison, options)
    assert training is not None
    config = parse_run_config(train_flags(options, training))
    assert (config.router.budget, config.optim.distill) == ("dense", 0.5)
    assert config.adapter.lora_targets == targets
    adapters = make_adapters(comparison.model, config.adapter)
    assert adapters is not None
    parameters = sum(parameter.numel() for parameter in adapters.tensors().values())
    of_a_rank = parameters / config.adapter.lora_rank
    assert abs(parameters - map_parameters(comparison, 0.25, 64)) <= of_a_rank / 2
    assert config.adapter.alpha == config.adapter.lora_rank


def test_flops_of_a_training_are_those_of_what_runs(comparison: Comparison) -> None:
    flops = {}
    for budget in ("dense", "static"):
        router = RouterConfig(layers="1-6", budget=budget)
        run = RunConfig(router=router, adapter=AdapterConfig(lora_rank=1))
        comparison.attach(router, run=run)
        engine = comparison.engine_of(run)
        rows = comparison.calibration[:1]
        flops[budget] = count_flops(functools.partial(engine.train_step, rows, 0.0, 0.0))
    comparison.attach(comparison.plain)
    assert 0.5 < flops["static"] / flops["dense"] < 0.95


def test_what_has_no_maps_has_no_fit_to_pay_for(comparison: Comparison, tmp_path: Path) -> None:
    write_json(tmp_path / COST, {"seconds": 1.0, "flops": 2})
    drops = StaticDrops(comparison, most=0.5, rank=4, order_rows=4, cost_file=tmp_path / COST)
    for method, is_fitted in (("static_lora", False), ("greedy_trained_lora", True)):
        assert (drops.fit_cost(method, 0.25) is not None) is is_fitted


def test_costs_stand_beside_those_of_lora_at_the_same_skip(tmp_path: Path) -> None:
    for name, seconds, flops in (("maps", 3.0, 8), ("lora", 6.0, 16)):
        (tmp_path / name / "routers").mkdir(parents=True)
        (tmp_path / name / "routers" / "w.safetensors").write_bytes(b"1234")
        write_json(tmp_path / name / "report.json", {"seconds": seconds})
        write_json(tmp_path / name / COST, {"flops": flops, "parameters": 5})
    fit = {"seconds": 1.5, "flops": 4, "parameters": 5, "bytes": 20}
    rows = over_control(
        [
            cost_of("greedy_fitted", 0.25, [], fit),
            cost_of("greedy_trained", 0.25, [tmp_path / "maps"], fit),
            cost_of("dense_adapted", 0.25, [tmp_path / "lora"], None),
            cost_of("dense_adapted", 0.5, [tmp_path / "lora"], None),
            cost_of("greedy_trained", 0.375, [tmp_path / "maps"], None),
        ]
    )
    assert [cost.seconds_ratio for cost in rows] == [0.25, 0.75, 1.0, 1.0, None]
    assert [cost.flops_ratio for cost in rows] == [0.25, 0.75, 1.0, 1.0, None]
    assert [cost.saved_bytes for cost in rows] == [20, 4, 4, 4, 4]
    assert rows[1].row()[1:5] == ("25.0%", "1.5", "3.0", "1.2e-11")


def test_continuations_of_the_dense_model_agree_with_themselves(comparison: Comparison) -> None:
    comparison.add_continuations(4, tokens=12)
    try:
        dense = comparison.measure(comparison.everything)
        (order,) = comparison.orders([0])["static"]
        dropped = comparison.measure(comparison.policy(order, 0.5))
    finally:
        comparison._yardstick.continuations = None
    assert dense.agreement is not None
    assert dropped.agreement is not None
    assert (dense.agreement.same == 1).all()
    assert dropped.agreement.same.mean() < 1
    assert dropped.agreement.likelihood.mean() < dense.agreement.likelihood.mean()
    point = comparison.point("static", 0.5, [dropped], dense)
    assert point.same == pytest.approx(dropped.agreement.same.mean())
    assert sum(gap.value > 0 for gap in point.domains.values()) == 1
