"""A run's report says what was measured, and warns where it is off; only the first rank writes."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import tiny_config

from megaskip.extras import MissingExtraError
from megaskip.parallel.results import StepResult
from megaskip.parallel.topology import Topology, read_topology
from megaskip.reporting.metrics import MetricsWriter
from megaskip.reporting.summary import closing_rows
from megaskip.reporting.trackers import open_trackers, require_trackers, run_ids
from megaskip.training.reporter import RunEnd, RunReporter, capacity_warnings


def step(capacity: float) -> StepResult:
    return StepResult(
        loss_task=2.0,
        loss_penalty=0.1,
        capacity=capacity,
        capacity_per_layer=(capacity, capacity),
        grad_norm=1.0,
        tokens=100,
        supervised_fraction=0.5,
    )


def reporter(folder: Path, topology: Topology | None = None) -> RunReporter:
    return RunReporter(
        config=tiny_config(),
        topology=topology or read_topology({}),
        output_dir=folder,
        layers=(1, 2),
        total_steps=30,
    )


def record(reporter: RunReporter, steps: range) -> None:
    for number in steps:
        scores = {1: torch.rand(4)}
        reporter.record(number, step(number / 100), lr=1e-3, seconds=2.0, scores=scores)


END = RunEnd(
    step=30,
    tokens=3000,
    held_out={},
    calibrated=0.5,
    trained_bytes=1536,
    trained_parameters=128,
    peak_memory_gib=1.0,
    written={"routers": Path("routers")},
)


def test_the_report_counts_the_compensations(tmp_path: Path) -> None:
    config = tiny_config()
    router = dataclasses.replace(config.router, compensation="low_rank", compensation_rank=4)
    run = RunReporter(
        config=dataclasses.replace(config, router=router),
        topology=read_topology({}),
        output_dir=tmp_path,
        layers=(1, 2),
        total_steps=30,
    )
    with run.open(0):
        record(run, range(1, 3))
        report = run.close(dataclasses.replace(END, compensation_parameters=576))
    sizes = {"layers": 2, "parameters": 576, "bytes": 2304}
    assert report["compensation"] == {"kind": "low_rank", "rank": 4, **sizes}
    rows = dict(closing_rows(report))
    assert (
        rows["compensation"] == "low_rank of rank 4 in 2 layers: 576 parameters, 0.00 MiB float32"
    )
    with run.open(0):
        record(run, range(3, 5))
        report = run.close(END)
    assert report["compensation"] is None
    assert "compensation" not in dict(closing_rows(report))


def test_the_report_averages_the_last_steps_and_describes_the_optimizer(tmp_path: Path) -> None:
    run = reporter(tmp_path)
    with run.open(0):
        record(run, range(1, 31))
        report = run.close(END)
    assert report["window"] == 20
    assert report["training_capacity"] == pytest.approx(sum(range(11, 31)) / 20 / 100)
    assert report["optimizer"].startswith("1.50 KiB (12 bytes for each of 128 trained")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens_per_second"] == 50 and first["capacity_per_layer"] == [0.01, 0.01]


def test_steps_after_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    for first, steps in ((0, range(1, 8)), (4, range(5, 10))):
        run = reporter(tmp_path)
        with run.open(first):
            record(run, steps)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_ranks_after_the_first_write_nothing(tmp_path: Path, capsys: Any) -> None:
    second = dataclasses.replace(read_topology({}), rank=1, world_size=2)
    run = reporter(tmp_path, second)
    with run.open(0):
        record(run, range(1, 3))
        run.held_out(2, {"loss_dense": 1.0})
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "held_out, calibrated, expected",
    [
        ((0.515, 0.005), 0.5, []),
        ((0.54, 0.01), 0.5, ["the capacity is off by +0.040: train longer"]),
        (None, 0.5, ["nothing is held out"]),
        (None, 0.45, ["nothing is held out", "the capacity is 0.450, asked was 0.500"]),
    ],
)
def test_a_capacity_is_off_only_where_chance_cannot_explain_it(
    held_out: tuple[float, float] | None, calibrated: float, expected: list[str]
) -> None:
    numbers: dict[str, float] = {}
    if held_out is not None:
        numbers = {"capacity": held_out[0], "capacity_standard_error": held_out[1]}
    report = {"held_out": numbers, "asked_capacity": 0.5, "calibrated_capacity": calibrated}
    warnings = capacity_warnings(report)
    assert len(warnings) == len(expected)
    for warning, start in zip(warnings, expected, strict=True):
        assert warning.startswith(start)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_names_its_extra(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(MissingExtraError, match=rf"pip install megaskip\[{name}\]"):
        require_trackers(["tensorboard", name])


def test_trackers_get_what_metrics_get_and_one_that_fails_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    board = open_trackers(["tensorboard"], tmp_path, {}, first_step=0)["tensorboard"]
    broken = Broken()
    with MetricsWriter(
        tmp_path, (1,), first_step=0, trackers={"broken": broken, "tensorboard": board}
    ) as metrics:
        for number in range(1, 4):
            metrics.record(number, {"loss_task": 2.0, "capacity_per_layer": [0.5]})
        metrics.held_out(3, {"loss_routed": 1.5})
    assert broken.calls == 2
    assert [r.getMessage()[:44] for r in caplog.records] == [
        "--report_to broken: it failed (no more disk)"
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/task")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("capacity_per_layer/001")] == [0.5] * 3
    assert [e.value for e in events.Scalars("held_out/loss_routed")] == [1.5]


class Broken:
    """A tracker whose library fails from the second step on."""

    errors = (ValueError,)
    calls = 0

    def scalars(self, step: int, values: Any) -> None:
        self.calls += 1
        if step == 2:
            raise ValueError("no more disk")

    histogram = image = close = scalars


def test_a_run_that_goes_on_keeps_its_name_in_a_tracker_and_a_new_one_has_another(
    tmp_path: Path,
) -> None:
    first = run_ids(tmp_path, ["wandb", "tensorboard"], is_new=True)
    assert set(first) == {"wandb"}
    again = run_ids(tmp_path, ["wandb", "mlflow"], is_new=False)
    assert again["wandb"] == first["wandb"] != again["mlflow"]
    assert run_ids(tmp_path, ["wandb"], is_new=True) != first
