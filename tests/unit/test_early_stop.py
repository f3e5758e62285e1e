"""A run ends early where held-out loss no longer falls, and keeps what was best."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_training_loop import files, stop_after
from tiny_run import alone, full_trainer, router_trainer, tiny_config

from megaskip.config import RunConfig, parse_run_config
from megaskip.errors import ConfigError
from megaskip.reporting.summary import closing_rows
from megaskip.training.early_stop import EarlyStop
from megaskip.training.run_folder import has_stopped_early


def entries(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"step": i, "loss_routed": s, "capacity": c} for i, (s, c) in enumerate(pairs, 1)]


@pytest.mark.parametrize(
    ("pairs", "best", "is_over"),
    [
        ([], None, False),
        ([(1.0, 1.0), (1.2, 0.8), (1.4, 0.6)], None, False),
        ([(1.0, 1.0), (1.5, 0.5), (1.4, 0.5), (1.6, 0.4)], 3, False),
        ([(1.5, 0.5), (1.6, 0.5), (1.2, 0.9), (1.5, 0.505)], 1, True),
        ([(math.nan, 0.5), (1.6, 0.5), (math.nan, 0.5), (1.7, 0.5)], 2, True),
    ],
    ids=["nothing", "everything_runs", "goes_on", "over", "not_a_number"],
)
def test_only_evaluations_that_run_as_little_as_asked_count(
    pairs: list[tuple[float, float]], best: int | None, is_over: bool
) -> None:
    early = EarlyStop(2, 0.5, entries(*pairs))
    assert (None if early.best is None else early.best.step) == best
    assert early.is_over == is_over
    assert not EarlyStop(0, 0.5, entries(*pairs)).is_over


@pytest.mark.parametrize(("make", "result"), [(full_trainer, "model"), (router_trainer, "routers")])
def test_a_run_that_gets_worse_stops_and_keeps_its_best(
    make: Any, result: str, tmp_path: Path
) -> None:
    config = diverging()
    with alone() as topology:
        whole = make(tmp_path / "whole", topology, config)
        report = whole.run()
        first = make(tmp_path / "run", topology, config)
        stop_after(first, step=2)
        assert first.run() == {}
        again = make(tmp_path / "run", topology, config)
        again.resume(tmp_path / "run/step_000002")
        assert again.run()["early_stop"] == report["early_stop"]
    ending = report["early_stop"]
    assert ending["stopped"] and ending["step"] == whole.step == ending["best_step"] + 2 < 6
    lines = (tmp_path / "whole/evaluations.jsonl").read_text().splitlines()
    name = "loss" if result == "model" else "loss_routed"
    losses = {entry["step"]: entry[name] for entry in map(json.loads, lines)}
    assert min(losses, key=losses.__getitem__) == ending["best_step"]
    assert report["held_out"][name] == pytest.approx(ending["best_loss"], abs=1e-6)
    assert files(tmp_path / "run" / result) == files(tmp_path / "whole" / result)
    assert dict(closing_rows(report))["early stop"].startswith("after 2 evaluations without")
    assert has_stopped_early(tmp_path / "whole", 2) and not has_stopped_early(tmp_path / "whole", 3)


def test_a_best_evaluation_whose_state_was_not_kept_counts_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that asks for --early_stop only when it goes on, or was killed before it was kept."""
    config = diverging()
    without = dataclasses.replace(config, log=dataclasses.replace(config.log, early_stop=0))
    with alone() as topology:
        first = full_trainer(tmp_path, topology, without)
        stop_after(first, step=2)
        assert first.run() == {}
        again = full_trainer(tmp_path, topology, config)
        again.resume(tmp_path / "step_000002")
        ending = again.run()["early_stop"]
    assert "--early_stop: what was trained at step 1 was not kept" in caplog.text
    assert (ending["best_step"], ending["step"]) == (6, 6)  # step 1 had the lowest loss of all


def diverging() -> RunConfig:
    config = tiny_config(lr=0.3, calibration_rows=0)  # which would change what was kept
    return dataclasses.replace(
        config, log=dataclasses.replace(config.log, eval_every=1, early_stop=2)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--early_stop", "2"], "add --eval_every"),
        (["--early_stop", "2", "--eval_every", "5", "--held_out", "0"], "needs held-out rows"),
        (["--report_to", "none,wandb"], "give none alone"),
        (["--report_to", "wandb,wandb"], "names a tracker twice"),
        (["--report_to", "wandbb"], "did you mean 'wandb'"),
    ],
)
def test_what_cannot_be_is_said(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_run_config(flags)


def test_trackers_are_those_asked_for() -> None:
    assert parse_run_config([]).log.trackers == ("tensorboard",)
    assert parse_run_config(["--report_to", "none"]).log.trackers == ()
    asked = parse_run_config(["--report_to", "tensorboard,wandb", "--no-tensorboard"])
    assert asked.log.trackers == ("wandb",)
