"""A run takes its steps, stops when asked, goes on where it was, and ends with a report."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import alone, full_trainer, router_trainer, tiny_config, tiny_data, tiny_loader

from megaskip.config.run import OptimConfig
from megaskip.errors import MegaskipError
from megaskip.reporting.summary import closing_rows
from megaskip.training import router_trainer as router_trainer_module
from megaskip.training.loop import AskedToStop, Trainer
from megaskip.training.schedule import learning_rate, total_steps

NOISE = {"tokens_per_second", "peak_memory_gib"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in NOISE} for line in lines]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_ends_with_routers_calibrated_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_trainer_module, "LONG_ROWS", 512)
    with alone() as topology:
        trainer = router_trainer(tmp_path, topology, tiny_config())
        report = trainer.run()
    assert report["steps"] == len(metrics(tmp_path)) == 6
    assert report["calibrated_capacity"] == trainer.calibrated is not None
    assert {"loss_dense", "loss_routed", "capacity"} <= report["held_out"].keys()
    (span,) = report["held_out"]["by_position"]  # the tiny rows end within the first of eight
    assert (span["first"], span["stop"]) == (0, 64)
    assert span["loss_routed"] == pytest.approx(report["held_out"]["loss_routed"])
    assert dict(closing_rows(report))["  positions 0 to 63"].startswith("dense ")
    assert set(report["written"]) == {"metrics", "routers", "picture"}
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == trainer.tokens
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000004", "step_000006"]


def test_every_weight_trains_and_a_model_is_left(tmp_path: Path) -> None:
    with alone() as topology:
        config = tiny_config(max_steps=24, lr=1e-3, seed=1_732_700_000)  # a time, as some take it
        trainer = full_trainer(tmp_path, topology, config)
        report = trainer.run()
    losses = [entry["loss_task"] for entry in metrics(tmp_path)]
    assert sum(losses[-8:]) < sum(losses[:8])  # three passes over the rows, which it remembers
    assert math.isfinite(report["held_out"]["loss"])
    assert set(report["written"]) == {"metrics", "model"}
    assert {"model.safetensors", "config.json"} <= files(tmp_path / "model").keys()
    assert report["calibrated_capacity"] is None


@pytest.mark.parametrize("make", [router_trainer, full_trainer])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(make: Any, tmp_path: Path) -> None:
    with alone() as topology:
        make(tmp_path / "whole", topology, tiny_config()).run()
        first = make(tmp_path / "run", topology, tiny_config())
        stop_after(first, step=3)
        assert first.run() == {}
        again = make(tmp_path / "run", topology, tiny_config())
        again.resume(tmp_path / "run/step_000003")
        again.run()
    assert again.step == 6
    name = "step_000006"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert files(tmp_path / "run" / name) == files(tmp_path / "whole" / name)


def stop_after(trainer: Trainer, step: int) -> None:
    """Send this process a SIGTERM while it takes step `step`."""
    launch_step = trainer.engine.launch_step

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return launch_step(*args, **kwargs)

    trainer.engine.launch_step = signalled  # type: ignore[method-assign]


def test_a_signal_stops_a_pass_over_held_out_rows_on_the_next_batch(tmp_path: Path) -> None:
    with alone() as topology:
        trainer = router_trainer(tmp_path, topology, tiny_config())
        with trainer._preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(AskedToStop):
                trainer.evaluate()
        assert not any(trainer.engine.routers.keep())


def test_an_evaluation_that_a_signal_stops_is_made_by_the_run_that_goes_on(tmp_path: Path) -> None:
    def evaluations() -> list[int]:
        lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    with alone() as topology:
        first = router_trainer(tmp_path, topology, tiny_config())
        evaluate = first.evaluate

        def signalled() -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate()

        first.evaluate = signalled  # type: ignore[method-assign]
        assert first.run() == {}
        again = router_trainer(tmp_path, topology, tiny_config())
        again.resume(tmp_path / "step_000003")
        again.run()
    assert evaluations() == [3]


def test_a_gradient_that_is_not_finite_ends_the_run_with_its_step(tmp_path: Path) -> None:
    with alone() as topology:
        trainer = router_trainer(tmp_path, topology, tiny_config())
        with torch.no_grad():
            for parameter in trainer.engine.parameters.values():
                parameter.fill_(torch.nan)
        with pytest.raises(MegaskipError, match="step 1: the gradient is nan"):
            trainer.run()
    assert not (tmp_path / "report.json").exists()


def test_without_held_out_rows_nothing_is_measured_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with alone() as topology, caplog.at_level("WARNING"):
        data = tiny_data(held_out=0)
        report = router_trainer(tmp_path, topology, tiny_config(), data).run()
    assert report["held_out"] == {}
    assert "nothing is held out" in caplog.text


def test_the_rate_climbs_to_its_peak_and_falls_to_its_floor() -> None:
    optim = OptimConfig(lr=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(optim, step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))
    assert learning_rate(optim, 10, 10) == pytest.approx(0.1)


def test_steps_are_what_is_asked_or_what_the_epochs_come_to() -> None:
    loader = tiny_loader(tiny_config())
    assert total_steps(OptimConfig(max_steps=7), loader) == 7
    assert total_steps(OptimConfig(epochs=2.0), loader) == 2 * 32 // loader.global_batch_size
    assert total_steps(OptimConfig(epochs=0.01), loader) == 1
