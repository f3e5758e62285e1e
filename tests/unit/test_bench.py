"""megaskip bench: its arithmetic, its clock, its runner, and every kind of part at a tiny shape."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensor_calls import OperationTape
from torch.utils.flop_counter import FlopCounterMode

from megaskip.arch import packing
from megaskip.bench import runner, sanity, serving, training, worker
from megaskip.bench.costs import (
    METHODS,
    attention_flops,
    extrapolated_seconds,
    layer_seconds,
    lora_parameters,
    map_flops,
    prefill_flops,
    training_flops,
)
from megaskip.bench.counters import from_names
from megaskip.bench.counts import account, bytes_moved, cache_bytes, size
from megaskip.bench.job import bench, chosen_parts
from megaskip.bench.parts import CPU, GPU, Case, Part, least_seconds, needed_bytes, parts_for
from megaskip.bench.records import DONE, FAILED, LEFT_OUT, Record, Records
from megaskip.bench.report import Report
from megaskip.bench.runner import Runner
from megaskip.bench.serving import compared, measure_serving, timed
from megaskip.bench.setup import Setup, Speeds
from megaskip.bench.shapes import SHAPES, Shape, build, config_of
from megaskip.bench.tables import variant_name
from megaskip.bench.timing import Limits, Sample, median_error, speedup, timed_pairs
from megaskip.bench.training import make_batch, make_engine, measure_training
from megaskip.bench.variants import (
    DENSE,
    Bench,
    Variant,
    decode,
    dropped,
    first_steps,
    prefill,
    routed,
    static,
    wired,
    with_maps,
)
from megaskip.cli.bench import parse
from megaskip.config.commands.bench import BenchOptions
from megaskip.errors import ConfigError
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.static_decode import RECORDERS
from megaskip.parallel.engine import Engine

MICRO = Shape(name="micro", vocabulary=97, hidden=32, mlp=48, layers=6, heads=4, kv_heads=2)
CASE = Case(name="32", rows=2, real=32)
PACKED = Case(name="32 packed", rows=2, real=32, segments=4)
H100 = Speeds(flops=7e14, bandwidth=2.5e12)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be one more shape, and let it stand for the smallest."""
    monkeypatch.setitem(SHAPES, "micro", MICRO)
    monkeypatch.setitem(SHAPES, "tiny", MICRO)


def setup() -> Setup:
    """Return what lets a part take the first pair of runs, and no other."""
    return Setup(
        device=torch.device("cpu"),
        dtype=torch.float32,
        speeds=Speeds(flops=1e11, bandwidth=1e10),
        until=time.monotonic(),
    )


def micro_bench(rows: int = 2, tokens: int = 16) -> Bench:
    torch.manual_seed(0)
    model = build(config_of(MICRO), "cpu", torch.float32)
    ids = torch.randint(MICRO.vocabulary, (rows, tokens + 2))
    return Bench(model=model, layers=(2,), prompt=ids[:, :-2], answer=ids[:, -2:])


# -- arithmetic


def test_shapes_have_the_parameters_of_the_models_that_are_built() -> None:
    model = build(config_of(MICRO), "cpu", torch.float32)
    norms = (2 * MICRO.layers + 1) * MICRO.hidden
    assert sum(p.numel() for p in model.parameters()) == MICRO.parameters + norms
    assert SHAPES["llama3-8b"].parameters == pytest.approx(8.03e9, rel=0.001)
    assert SHAPES["llama3-70b"].parameters == pytest.approx(70.6e9, rel=0.001)


@pytest.mark.parametrize("method", METHODS)
def test_training_flops_are_those_that_torch_counts(method: str) -> None:
    engine: Any = make_engine(method, MICRO, torch.device("cpu"), torch.float32)
    engine.module.model.set_attn_implementation("eager")
    batch = make_batch(CASE, MICRO.vocabulary)
    with FlopCounterMode(display=False) as counter:
        engine.train_step([batch], 1e-6)
    # Eager attention computes the whole square, of which the other half is not needed.
    backward = MICRO.layers // 2 if method == "routers" else MICRO.layers
    other_half = (MICRO.layers + 2 * backward) * attention_flops(MICRO, 32)
    expected = training_flops(MICRO, method, 2, 32) + 2 * other_half
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    if method == "lora":
        trained = sum(p.numel() for p in engine.parameters.values())
        assert trained == MICRO.layers * lora_parameters(MICRO)


def test_packed_rows_run_with_the_attention_that_training_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the family's own, eager, as if it took lengths; on a GPU flash or flex attention."""
    told: list[tuple[str, bool]] = []
    step = Engine.train_step

    def note(engine: Any, *args: Any) -> Any:
        told.append((packing.attention_of(engine.module.model), engine.module.takes_lengths))
        return step(engine, *args)

    monkeypatch.setattr(packing, "_faster", lambda model: ["eager"])
    takes = lambda model: packing.attention_of(model) == "eager"  # noqa: E731
    monkeypatch.setattr(training, "takes_lengths", takes)
    monkeypatch.setattr(Engine, "train_step", note)
    part = Part(
        name="t", kind="train", shape="micro", method="routers", cases=(CASE, PACKED), seconds=1
    )
    rows = list(measure_training(part, setup()))[-1]
    assert [row["attention"] for row in rows] == ["sdpa", "eager"]
    assert set(told) == {("sdpa", False), ("eager", True)}


@pytest.mark.parametrize(
    ("granularity", "rank"),
    [("", 0), ("attn_sequence", 0), ("mlp_sequence", 0), ("block_sequence", 0)]
    + [("attn_sequence", 8)],
)
def test_prefill_flops_are_those_that_torch_counts(granularity: str, rank: int) -> None:
    bench = micro_bench()
    variant = dropped(bench, granularity, 0.0) if granularity else DENSE
    variant = with_maps(variant, rank) if rank else variant
    with torch.no_grad(), wired(bench, variant) as override:
        counted = account(bench, variant, override)["prefill_gflop"] * 1e9
    target = granularity.split("_")[0]
    attention = 5 / 6 if target in ("attn", "block") else 1.0
    mlp = 5 / 6 if target in ("mlp", "block") else 1.0
    expected = prefill_flops(MICRO, 2, 16, attention=attention, mlp=mlp)
    expected += map_flops(MICRO, rank, 2 * 16)
    other_half = 2 * attention * MICRO.layers * attention_flops(MICRO, 16)
    assert counted == pytest.approx(expected + other_half, rel=1e-3)


@torch.no_grad()
def test_a_decode_step_moves_the_keys_and_values_that_its_cache_copies() -> None:
    bench = micro_bench()
    table = size(bench.model.get_input_embeddings())
    target = "attn_sequence"
    cases = [(DENSE, 0, 3), (routed(bench, target, "keep", 0.0), 1, 3)]
    for variant, skipped, times in [*cases, (static(bench, target, 0.0), 1, 1)]:
        with wired(bench, variant) as override:
            cache = prefill(bench, variant, override)
            *_, last = decode(bench, variant, override, cache)
            moved, weights = bytes_moved(bench, variant, cache, last), size(bench.model) - table
        held = cache_bytes(cache)
        assert held == 4 * 2 * MICRO.kv_values(18) * (MICRO.layers - skipped) // MICRO.layers
        weights -= skipped * 4 * MICRO.attention_parameters
        # A cache that grows is read, copied to a larger one, and read by attention.
        assert moved == weights + times * held


@torch.no_grad()
def test_a_static_variant_is_timed_from_where_its_steps_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tape = OperationTape()
    monkeypatch.setitem(RECORDERS, "cpu", lambda device: tape)
    bench = micro_bench()
    bench = dataclasses.replace(bench, answer=bench.prompt[:, :6])
    variant = static(bench, "block_sequence", 0.5)
    assert first_steps(bench, variant) == 3 and first_steps(bench, DENSE) == 0
    with wired(bench, variant) as override:
        prefilled, decoded, begun = timed(bench, variant, override, setup().watch)
    assert min(prefilled, decoded, begun) > 0
    assert tape.replays == 4


def test_deep_models_are_extrapolated_by_a_straight_line() -> None:
    assert layer_seconds((4, 1.0), (8, 1.8)) == pytest.approx(0.2)
    assert extrapolated_seconds((4, 1.0), (8, 1.8), 80) == pytest.approx(0.2 + 80 * 0.2)


def test_launches_and_waits_are_counted_by_their_names() -> None:
    names = {"aten::mm": 3, "cudaLaunchKernelExC": 2, "cuLaunchKernel": 1, "cudaGraphLaunch": 1}
    names |= {"cudaStreamSynchronize": 4, "cudaDeviceSynchronize": 9, "aten::nonzero": 5}
    counted = from_names(names, is_cuda=True)
    assert counted == {"operators": 8, "launches": 4, "waits": 4}
    assert from_names(names, is_cuda=False) == {"operators": 8, "waits": 5}
    # No figure is better than a wrong one where the profiler is kept from the runtime's calls.
    assert from_names({"aten::mm": 3}, is_cuda=True) == {"operators": 3}


# -- the clock


def test_runs_stand_in_pairs_whose_order_changes() -> None:
    order: list[str] = []

    def run(name: str) -> Sample:
        order.append(name)
        return (2.0,) if name == "base" else (1.0,)

    *_, pairs = timed_pairs(run, ["a"], "base", Limits(turns=3, warmup=1))
    assert order == ["a", "base", "base", "a", "a", "base", "base", "a"]
    assert len(pairs["a"]) == 3
    assert dataclasses.astuple(speedup(pairs["a"])) == (2.0, 0.0)
    assert median_error([1.0]) is None


def test_turns_end_with_the_time_and_leave_out_what_failed() -> None:
    def run(name: str) -> Sample:
        return (math.nan,) if name == "large" else (1.0,)

    over = Limits(turns=9, until=time.monotonic())
    *_, pairs = timed_pairs(run, ["large", "a", "b"], "base", over)
    assert {name: len(own) for name, own in pairs.items()} == {"large": 0, "a": 1, "b": 0}


# -- which parts there are


def test_a_part_of_every_promise_is_there_and_fits_its_card() -> None:
    parts = parts_for(GPU)
    assert len({part.name for part in parts}) == len(parts)
    served = {(part.batch, part.prompt) for part in parts if part.kind == "serve"}
    assert served >= {(b, p) for b in (1, 16, 64) for p in (2048, 8192, 32768)}
    for shape in ("llama3-1b", "llama3-8b"):
        assert {p.method for p in parts if p.kind == "train" and p.shape == shape} == set(METHODS)
    sizes = {part.name: needed_bytes(part, 2) / 2**30 for part in parts}
    # Measured on an H200 (docs/speed.md).
    assert sizes["train-llama3-8b-routers"] == pytest.approx(26.5, rel=0.2)
    assert sizes["train-llama3-8b-lora"] == pytest.approx(53.6, rel=0.2)
    assert sizes["serve-llama3-8b-batch-64-prompt-32768"] > 141 > sizes["train-llama3-8b-full"] > 64


def test_the_parts_of_most_value_fit_into_eight_minutes_together() -> None:
    spent, fitting = 0.0, []
    for part in parts_for(GPU):
        if spent + least_seconds(part, GPU, H100, 2) < 8 * 60:
            fitting.append(part.name)
            spent += part.seconds
    assert {"serve-llama3-8b-batch-16-prompt-2048", "train-llama3-8b-full"} <= set(fitting)


def test_parts_are_chosen_by_texts_and_always_with_the_machine() -> None:
    options = parse(["cpu", "--parts", "tiny-lora,zero3"])
    names = [part.name for part in chosen_parts(options)]
    assert names == ["machine", "train-tiny-lora", "train-tiny-lora-6-layers", "zero3"]
    with pytest.raises(ConfigError, match="--parts 'zero2' is in no part's name; did you mean"):
        chosen_parts(parse(["cpu", "--parts", "zero2"]))


# -- the command


def test_the_first_word_is_the_device() -> None:
    assert parse(["cpu", "--minutes", "2"]) == BenchOptions(device="cpu", minutes=2)
    with pytest.raises(ConfigError, match="--device 'cup' is not one of gpu, cpu; did you mean"):
        parse(["cup"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_message_names_the_command_that_works() -> None:
    with pytest.raises(ConfigError, match=r"torch sees no GPU .*`megaskip bench cpu`"):
        bench(parse(["gpu"]))


# -- the runner


def measures(calls: Path) -> dict[str, Any]:
    """Return parts of a report that end in every way; each notes that it was called."""

    def machine(part: Part, setup: Setup) -> Iterator[list[dict[str, Any]]]:
        row = {"table": "machine", "device": "x", "memory_bytes": 2**30, "dtype": "float32"}
        yield [row | {"flops": 1e12, "bandwidth": 1e11}]

    def act(part: Part, setup: Setup) -> Iterator[list[dict[str, Any]]]:
        with open(calls, "a") as file:
            file.write(f"{part.name} ")
        yield [{"table": "a", "n": 1}]
        if part.name == "dies":
            os._exit(9)
        if part.name == "hangs":
            time.sleep(60)
        if part.name == "memory":
            raise torch.OutOfMemoryError
        yield [{"table": "a", "n": 1}, {"table": "a", "n": 2}]

    return {"machine": machine, "routing": act}


def run_parts(folder: Path, names: str) -> dict[str, Record]:
    parts = [Part(name="machine", kind="machine", seconds=60)]
    seconds = {"hangs": 0.3}
    parts += [
        Part(name=name, kind="routing", seconds=seconds.get(name, 60)) for name in names.split()
    ]
    parts.append(dataclasses.replace(parts[-1], name="large", shape="llama3-8b", kind="serve"))
    records = Records(folder)
    records.open({"device": "cpu"})
    end = time.monotonic() + 200
    Runner(device=CPU, records=records, end=end, start_method="fork").run(parts)
    read = {part.name: records.read(part.name) for part in parts}
    return {name: record for name, record in read.items() if record is not None}


def test_what_crashes_hangs_or_does_not_fit_is_recorded_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setattr(worker, "_MEASURES", measures(calls))
    for name, value in {"_GRACE": 0.3, "_OVERRUN": 0.0}.items():
        monkeypatch.setattr(runner, name, value)
    names = "good dies hangs memory last"
    records = run_parts(tmp_path / "a", names)
    status = {name: record.status for name, record in records.items()}
    assert status == {
        "machine": DONE,
        "good": DONE,
        **dict.fromkeys(("dies", "hangs", "memory"), FAILED),
        "last": DONE,
        "large": LEFT_OUT,
    }
    assert [len(records[name].rows) for name in names.split()] == [2, 1, 1, 1, 2]
    assert "ended with status 9" in records["dies"].reason
    assert "did not end in time" in records["hangs"].reason
    assert records["memory"].reason == "out of memory"
    assert records["large"].reason == "needs about 30 GiB, the device has 1"
    # The same command goes on with what is not done.
    assert calls.read_text().split() == names.split()
    run_parts(tmp_path / "a", "good dies memory")
    assert calls.read_text().split() == [*names.split(), "dies", "memory"]


def test_a_folder_of_another_setting_is_refused(tmp_path: Path) -> None:
    Records(tmp_path).open({"device": "cpu", "torch": "2.8"})
    with pytest.raises(ConfigError, match=r"something else \(torch 2.8 there, 2.9 here\)"):
        Records(tmp_path).open({"device": "cpu", "torch": "2.9"})


# -- measures and report


def test_a_report_has_tables_and_a_picture_of_what_is_measured(tmp_path: Path) -> None:
    made = {"shape": "micro", "seconds": 60, "turns": 1}
    parts = [Part(name=m, kind="train", method=m, cases=(CASE, PACKED), **made) for m in METHODS]
    parts.append(dataclasses.replace(parts[0], name="stack", layers=6, cases=(CASE,)))
    served = Part(name="serve", kind="serve", batch=2, prompt=16, steps=2, **made)
    report = Report(device=CPU, folder=tmp_path, versions={"torch": "2.8"})
    for part in (*parts, served):
        measure = measure_serving if part.kind == "serve" else measure_training
        *_, rows = measure(part, setup())
        report.add(Record(name=part.name, status=DONE, rows=rows))
    report.add(Record(name="zero3", status=LEFT_OUT, reason="deepspeed is not installed"))
    report.draw()
    # The norm of the gradients and the loss are read together; AdamW's step counters do not count.
    assert {r["waits"] for r in report.rows("train") if r["method"] in ("lora", "full")} == {1}
    text = report.markdown()
    for expected in ("| micro | LoRA | 32 packed |", "| micro | router-tuning | 32 | 3 and 6 |"):
        assert expected in text
    for variant in ("dense", "block routed, all skipped"):
        assert f"| micro | 2 | 16 | {variant} |" in text
    assert "- zero3: deepspeed is not installed" in text
    assert "nan" not in (tmp_path / "report.json").read_text().lower()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_every_way_to_skip_is_compared_whole_blocks_first() -> None:
    names = [
        variant_name({"variant": v.name, "granularity": v.granularity, "kept": v.kept})
        for v in compared(micro_bench(rows=4))
    ]
    ways = ("routed, all skipped", "static, all skipped", "dropped", "routed, everything runs")
    expected = [f"{target} {way}" for target in ("block", "attn", "mlp") for way in ways]
    expected.insert(2, "block static, everything runs")
    behind = expected.index("attn dropped") + 1
    expected[behind:behind] = ["attn routed with maps, all skipped", "attn dropped with maps"]
    halves = [f"{what}, 50% kept" for what in ("block routed", "attn routed", "block static")]
    assert names == [*expected, *halves]


def test_maps_are_measured_beside_attentions_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def attentions(bench: Bench) -> list[Variant]:
        skips = [v for v in compared(bench) if v.granularity == "attn_sequence" and not v.asked]
        return [variant for variant in skips if not variant.static]

    monkeypatch.setattr(serving, "compared", attentions)
    part = Part(name="s", kind="serve", shape="micro", batch=2, prompt=16, steps=2, seconds=60)
    *_, rows = measure_serving(
        dataclasses.replace(part, turns=1),
        dataclasses.replace(setup(), until=time.monotonic() + 60),
    )
    flops = {variant_name(row): row["prefill_flops"] for row in rows}
    maps = map_flops(MICRO, 64, 2 * 16 * 3)  # three layers of six are routed
    for plain, mapped in (
        ("attn routed, all skipped", "attn routed with maps, all skipped"),
        ("attn dropped", "attn dropped with maps"),
    ):
        assert flops[mapped] - flops[plain] == pytest.approx(maps)


class Forgetful(InferenceExecutor):
    """Leaves every MLP out."""

    def mlp(self, run: Any, hidden_states: Any, decision: Any, *, is_tuple: bool) -> Any:
        return torch.zeros_like(hidden_states)


def test_skipping_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(name="routing", kind="routing", seconds=60)
    *_, rows = sanity.check_routing(part, setup())
    assert [row["passed"] for row in rows] == [True] * 6
    monkeypatch.setattr(sanity, "InferenceExecutor", Forgetful)
    *_, rows = sanity.check_routing(part, setup())
    assert [row["passed"] for row in rows] == [True, True, False, False, False, False]
