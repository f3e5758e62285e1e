"""megaskip fit and megaskip drop: what they say, and what they refuse before anything runs."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from megaskip.calibration.fit_job import _next
from megaskip.calibration.static_drop import Fitted, candidate_layers
from megaskip.cli import drop, fit
from megaskip.config.commands.fit import DropPlan
from megaskip.errors import ConfigError
from megaskip.parallel.loading.source import DEMO_FOLDER
from megaskip.runs.drop import _start

SMALL = ["--model", "demo", "--data", "demo"]


def fitted(**changes: Any) -> Fitted:
    measured = {"dense": 2.0, "dropped": 2.5, "compensated": 1.9, "explained": {3: 0.5}}
    return Fitted(order=[3], steps=[], **{**measured, **changes})


def test_a_gain_is_shown_as_one_and_maps_only_where_there_are_any() -> None:
    rows = dict(fitted().rows())
    assert rows["layers dropped"] == "2.5000 (+0.5000)"
    assert rows["maps in their places"] == "1.9000 (-0.1000)"
    assert "maps in their places" not in dict(fitted(explained={}).rows())


def test_layers_to_drop_are_whole_ones_of_those_that_may_go() -> None:
    assert candidate_layers(DropPlan(drop=25.0), 30) == (tuple(range(1, 30)), 8)
    assert candidate_layers(DropPlan(drop=1.0), 30)[1] == 1
    assert candidate_layers(DropPlan(drop_layers="4"), 30) == ((4,), 1)
    with pytest.raises(ConfigError, match="the model has one layer, .* name it with --drop_layers"):
        candidate_layers(DropPlan(), 1)
    with pytest.raises(ConfigError, match="--drop_layers 30: layer 30 is out of range"):
        candidate_layers(DropPlan(drop_layers="30"), 30)
    with pytest.raises(ConfigError, match="asks for 15 of 30 layers, and 6 may go"):
        candidate_layers(DropPlan(drop=50.0, candidates="5-10"), 30)


def test_ranks_that_do_not_fill_the_stages_are_refused() -> None:
    with pytest.raises(ConfigError, match="--nproc 3 ranks cannot form copies of 2 stages"):
        drop.parse([*SMALL, "--output", "o", "--nproc", "3", "--pipeline_stages", "2"])


def test_what_only_the_training_would_refuse_is_refused_before_the_fit(tmp_path: Path) -> None:
    argv = [*SMALL, "--output", str(tmp_path / "o")]
    with pytest.raises(ConfigError, match=r"--distill 1\.5 is outside \[0, 1\]"):
        drop.parse([*argv, "--distill", "1.5"])
    with pytest.raises(ConfigError, match="--seed is 18446744073709551616, expected a whole"):
        drop.parse([*argv, "--seed", str(2**64)])


def test_the_present_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new folder would take its place, and what is kept beside it has no name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--output \. is the present folder; name a new"):
        drop.main([*SMALL, "--output", "."])


def test_cosine_does_not_run_in_stages() -> None:
    argv = [*SMALL, "--output", "o", "--order", "cosine", "--pipeline_stages", "2"]
    for command in (fit, drop):
        with pytest.raises(ConfigError, match="--order cosine does not run in stages"):
            command.parse([*argv, *(["--nproc", "2"] if command is drop else [])])


def test_work_that_was_begun_with_other_flags_is_not_taken_for_this_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done of a command is kept, so another command must not find it."""
    started: list[list[str]] = []
    monkeypatch.setattr("megaskip.runs.drop._start", started.append)
    argv = [*SMALL, "--output", str(tmp_path / "smaller")]
    drop.main([*argv, "--drop", "25"])
    assert [command[3] for command in started] == ["fit", "train", "export-static"]
    drop.main([*argv, "--drop", "25"])
    with pytest.raises(ConfigError, match=r"was begun with --drop 25.0, not 50.0; .*--work_dir"):
        drop.main([*argv, "--drop", "50"])
    assert len(started) == 6
    recorded = json.loads((tmp_path / "smaller.work/drop.json").read_text())
    assert recorded["drop"] == 25.0
    del recorded["compensation_lr"]  # as of a version that had no such flag
    (tmp_path / "smaller.work/drop.json").write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match="was begun by a version without --compensation_lr"):
        drop.main([*argv, "--drop", "25"])


def test_adapters_train_with_the_maps_and_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("megaskip.runs.drop._start", started.append)
    argv = [*SMALL, "--output", str(tmp_path / "smaller"), "--lora_rank", "4", "--lora_lr", "1e-3"]
    drop.main([*argv, "--compensation", "none"])
    fitted, trained, exported = started
    assert {"--lora_rank=4", "--lora_lr=0.001"} <= set(trained)
    assert "--merge" in exported and not any("lora" in flag for flag in fitted)
    for flags, message in (
        (["--steps", "0"], "--lora_rank needs --steps"),
        (["--lora_start", "2"], "--lora_start 2 with --budget static"),
    ):
        with pytest.raises(ConfigError, match=message):
            drop.main([*argv, *flags])
    config = json.loads((DEMO_FOLDER / "backbone/config.json").read_text())
    packed = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    with pytest.raises(ConfigError, match="are packed in 4 bit; name the 16-bit model"):
        drop.main([*argv, "--model", str(tmp_path)])


def test_an_export_of_fitted_maps_has_the_tokenizer_and_template_they_were_fitted_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("megaskip.runs.drop._start", started.append)
    given = ["--tokenizer=t", "--chat_template=c.jinja"]
    argv = [*SMALL, *given, "--output", str(tmp_path / "smaller")]
    drop.main([*argv, "--steps", "0"])
    assert [command[3] for command in started] == ["fit", "export-static"]
    assert all(set(given) <= set(command) for command in started)
    drop.main([*argv, "--steps", "9", "--work_dir", str(tmp_path / "other")])
    assert not set(given) & set(started[-1])  # the run knows them
    options = fit.parse([*argv[:-1], "fitted"])
    assert _next(options).endswith("--distill 0.5 --tokenizer t --chat_template c.jinja")


def test_an_interrupted_command_waits_for_its_training_to_save(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    # A worker of pytest-xdist ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _start(["sh", "-c", f"sleep 0.6; touch {saved}"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved.is_file()
