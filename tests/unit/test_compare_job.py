"""The job of `megaskip compare`: what is measured stays in files, for a second start and for other
ranks."""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megaskip.checkpoint.atomic import write_json
from megaskip.config import ModelConfig
from megaskip.config.commands.compare import CompareOptions
from megaskip.errors import CheckpointError, ConfigError, MegaskipError
from megaskip.parallel.loading.source import DEMO_FOLDER, resolve_source
from megaskip.parallel.topology import LAUNCHER_VARIABLES
from megaskip.study.earlier_runs import START, has_start, start_settings
from megaskip.study.job import compare
from megaskip.study.ledger import Job, Ledger
from megaskip.study.recipes import Training, train_missing

pytestmark = pytest.mark.usefixtures("warm_python")


@pytest.fixture
def options(tmp_path: Path) -> CompareOptions:
    rows = [{"query": f"Say {word}.", "choices": [word, "no"], "gold": 0} for word in ("yes", "a")]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pair = {"sentence_good": "The dogs bark.", "sentence_bad": "The dogs barks."}
    (tmp_path / "blimp").mkdir()
    (tmp_path / "blimp" / "agreement.jsonl").write_text(json.dumps(pair))
    return CompareOptions(
        model="demo",
        data=("demo",),
        documents=4,
        blimp=tmp_path / "blimp",
        choice=(tmp_path / "words.jsonl",),
        skip=(25.0,),
        seeds=(0, 1),
        methods=("random", "uniform"),
        layers="1-6",
        seq_length=64,
        calibration_rows=8,
        prefill_runs=0,
        output=tmp_path / "out",
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CompareOptions:
    """Return options whose only run is trained and measured."""
    options = CompareOptions(
        model="demo",
        data=("demo",),
        documents=4,
        skip=(25.0,),
        seeds=(0,),
        methods=("dense_lora",),
        ours="dense_lora",
        layers="1-6",
        steps=2,
        dtype="bfloat16",
        seq_length=32,
        calibration_rows=8,
        lora_rank=2,
        prefill_runs=0,
        output=tmp_path_factory.mktemp("compare"),
    )
    with launched():
        compare(options)
    return options


@contextlib.contextmanager
def launched(**variables: str) -> Iterator[None]:
    """Let a launcher have set these variables and no others in here."""
    others = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with mock.patch.dict(os.environ, others | variables, clear=True):
        yield


def test_ranks_share_out_the_work_and_nothing_is_measured_twice(options: CompareOptions) -> None:
    folder = options.output / "measured"
    with launched(RANK="1", WORLD_SIZE="2"):
        compare(options)
    theirs = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(file.stem for file in theirs) == ["random-0.2500-s0", "uniform-0.2500"]
    assert not (options.output / "report.json").exists()  # the first rank's
    with launched():  # goes on alone, with what the rank has done
        compare(options)
    assert {file: file.stat().st_mtime_ns for file in theirs} == theirs
    assert {file.stem for file in folder.iterdir()} - {file.stem for file in theirs} == {
        *("dense-0.0000", "random-0.2500-s1")
    }
    report = json.loads((options.output / "report.json").read_text())
    assert [point["method"] for point in report["points"]] == ["dense", "random", "uniform"]
    random = report["points"][1]
    assert (random["seeds"], random["tasks"].keys()) == (2, {"blimp", "words"})
    assert random["tasks"]["words"]["acc_norm"] == random["choice"]
    assert random["tasks"]["blimp"]["acc"] == random["pairs"]
    assert "words" in (options.output / "report.html").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 3}, "was trained with max_steps 2, --steps asks for 3"),
        ({"dtype": "float32"}, "was trained with dtype bfloat16, --dtype asks for float32"),
        ({"layers": "1-5"}, "was trained with layers 1-6, --layers asks for 1-5"),
        ({"lora_lr": 0.5}, "was trained with lora_lr 0.0002, --lora_lr or --adapter_lr asks"),
        ({"data": ("demo:2",)}, "was trained with data"),
        # It would be measured on rows that it was trained on.
        ({"documents": 8}, "was trained with held_out 4, --documents or --eval_data asks for 8"),
    ],
)
def test_a_run_with_other_settings_is_not_taken_for_what_is_asked(
    trained: CompareOptions, changed: dict[str, Any], message: str
) -> None:
    with launched(), pytest.raises(ConfigError, match=message):
        compare(dataclasses.replace(trained, **changed))


def test_a_run_with_the_same_settings_is_taken(
    trained: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaskip.study.recipes.run_child", None)  # nothing is trained
    with launched():
        compare(trained)
        compare(dataclasses.replace(trained, steps=3, no_training=True))
        # Rates of what the run has none of: a default may have changed since.
        compare(dataclasses.replace(trained, compensation_lr=0.5, compensation_rank=2))
    run = json.loads((trained.output / "runs" / "dense_lora-r2-s0" / "run.json").read_text())
    assert run["config"]["model"]["dtype"] == "bfloat16"


def test_too_little_text_for_costs_is_said_before_anything_is_trained(
    options: CompareOptions,
) -> None:
    options = dataclasses.replace(options, methods=("by_cost",), cost_rows=8)
    with launched(), pytest.raises(ConfigError, match="--cost_rows 8: 1 batch of text is too litt"):
        compare(options)


def test_maps_are_trained_under_routers_by_cost(options: CompareOptions) -> None:
    options = dataclasses.replace(
        options,
        methods=("by_cost_fitted", "by_cost_trained"),
        ours="by_cost_trained",
        granularity="mlp_token",
        steps=2,
        seeds=(1,),
        cost_rows=32,
        cost_groups=2,
        compensation_rank=4,
        calibration_rows=32,
    )
    with launched():
        compare(options)
        compare(options)  # takes what is there
    start = load_file(options.output / "fitted/by_cost_trained-0.2500-s1/routers.safetensors")
    (run,) = (options.output / "runs").glob("by_cost_trained-*-s1")
    trained = load_file(run / "routers/routers.safetensors")
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    assert changed
    assert all("compensation" in name for name in changed)
    report = json.loads((options.output / "report.json").read_text())
    points, costs = report["points"], report["costs"]
    assert [point["method"] for point in points] == ["dense", *options.methods]
    fitted, then_trained = costs
    assert fitted["train_seconds"] is None
    assert fitted["fit_seconds"] == then_trained["fit_seconds"] > 0
    assert then_trained["flops"] > fitted["flops"] > 0
    assert fitted["parameters"] > then_trained["parameters"] > 0  # its routers do not learn
    assert points[1]["loss"] != points[2]["loss"]
    for point in points[1:]:
        assert point["skipped"] == pytest.approx(0.25, abs=0.1)


def test_measurements_that_another_comparison_has_written_over_are_named(
    trained: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Ledger.read

    def without_dense(ledger: Ledger, job: Job) -> Any:
        return None if job.method == "dense" else read(ledger, job)

    monkeypatch.setattr(Ledger, "wait", lambda ledger, jobs: None)
    monkeypatch.setattr(Ledger, "read", without_dense)
    with launched(), pytest.raises(CheckpointError, match="give each its own --output"):
        compare(trained)


def test_baselines_skip_the_same_with_maps_in_the_places_of_what_they_skip(
    options: CompareOptions,
) -> None:
    options = dataclasses.replace(
        options,
        methods=("random", "random_fitted", "uniform", "uniform_fitted"),
        seeds=(1,),
        blimp=None,
        choice=(),
        calibration_rows=64,
        compensation_rank=4,
    )
    with launched():
        compare(options)
    report = json.loads((options.output / "report.json").read_text())
    _, *points = report["points"]
    assert [point["method"] for point in points] == list(options.methods)
    for plain, fitted in (points[:2], points[2:]):
        assert fitted["loss"] != plain["loss"]
        assert fitted["skipped"] == plain["skipped"]
        assert fitted["seeds"] == plain["seeds"] == 1
    assert [cost["method"] for cost in report["costs"]] == ["random_fitted", "uniform_fitted"]
    # A map is x A B + b: all six routed layers of random skipping have one, two of uniform.
    of_a_map = AutoConfig.from_pretrained(DEMO_FOLDER / "backbone").hidden_size * (2 * 4 + 1)
    assert [cost["parameters"] for cost in report["costs"]] == [6 * of_a_map, 2 * of_a_map]


def test_a_run_of_another_model_is_not_taken(trained: CompareOptions, tmp_path: Path) -> None:
    model = shutil.copytree(DEMO_FOLDER / "backbone", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    other = {name: 1.01 * tensor for name, tensor in weights.items()}
    save_file(other, model / "model.safetensors")
    options = dataclasses.replace(trained, model=str(model), no_training=True)
    with (
        launched(),
        pytest.raises(CheckpointError, match="dense_lora-r2-s0 belongs to another base"),
    ):
        compare(options)


def test_routers_to_start_from_are_made_anew_unless_a_run_began_from_them(
    options: CompareOptions, tmp_path: Path
) -> None:
    base = resolve_source(ModelConfig(model="demo")).describe()
    training = Training(folder=tmp_path / "run", flags=(), start=tmp_path / "start")
    asked = start_settings("greedy_trained", options, base)
    assert not has_start(training, asked)
    write_json_in(tmp_path / "start" / "router_config.json", {})
    assert not has_start(training, asked)  # stopped in the middle
    write_json_in(tmp_path / "start" / START, asked)
    assert has_start(training, asked)
    changes = [{"layers": "1-5"}, {"order_rows": 7}, {"compensation_rank": 7}, {"documents": 5}]
    others = [dataclasses.replace(options, **change) for change in changes]
    for other in others:
        assert not has_start(training, start_settings("greedy_trained", other, base))
    write_json_in(tmp_path / "run" / "run.json", {})
    for other, change in zip(others, changes, strict=True):
        with pytest.raises(ConfigError, match=f"run began from .*start, made with {[*change][0]} "):
            has_start(training, start_settings("greedy_trained", other, base))
    assert start_settings("static_lora", others[1], base) == start_settings(
        "static_lora", others[2], base
    )


def write_json_in(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_json(file, content)


def test_after_a_training_that_failed_no_further_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def train(options: CompareOptions, training: Training, gpu: int | None) -> None:
        begun.append(training.folder.name)
        if len(begun) == 1:
            raise MegaskipError("it failed")
        time.sleep(0.2)  # the second may have begun before the first one's error was seen

    monkeypatch.setattr("megaskip.study.recipes._train", train)
    needed = [Training(folder=tmp_path / name, flags=()) for name in "abcd"]
    options = CompareOptions(model="demo", data=("demo",), output=tmp_path)
    with pytest.raises(MegaskipError, match="it failed"):
        train_missing(needed, options, gpu=None, progress=lambda: None)
    assert begun[0] == "a" and len(begun) <= 2
