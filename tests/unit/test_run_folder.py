"""Which folder a run writes into, and that no other run is lost or mixed with it there."""

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import filelock
import pytest
from families import tiny_model

from megaskip import RouterConfig, attach_routers, save_routers
from megaskip.checkpoint.resume import COMPLETE
from megaskip.cli.train import main as train
from megaskip.config import RunConfig
from megaskip.config.run import CheckpointConfig
from megaskip.errors import ConfigError
from megaskip.parallel.topology import process_group, read_topology
from megaskip.training.run_folder import choose_run_folder, hold_run_folder, is_finished, reopen

RESUME = RunConfig(checkpoint=CheckpointConfig(resume="auto"))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return runs/ with a run that was begun, and a newer folder in which none ever was."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    for number in ("001", "002"):
        (folder / f"demo-attn_sequence-{number}").mkdir(parents=True)
    checkpoint = folder / "demo-attn_sequence-001/step_000003"
    checkpoint.mkdir()
    (checkpoint / COMPLETE).touch()
    return folder


def test_the_newest_run_that_has_a_checkpoint_goes_on(runs: Path) -> None:
    folder, checkpoint = choose_run_folder(RESUME)
    assert (folder.name, checkpoint and checkpoint.name) == (
        "demo-attn_sequence-001",
        "step_000003",
    )
    folder, checkpoint = choose_run_folder(RunConfig())
    assert (folder.name, checkpoint) == ("demo-attn_sequence-003", None)


def test_a_start_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--layers"):
        train(["--layers", "7-20", "--held_out", "8", "--dtype", "float32"])
    assert not list((tmp_path / "runs").iterdir())


def test_nothing_to_go_on_from_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = dataclasses.replace(RESUME.checkpoint, output_dir=str(tmp_path / "new"))
    with caplog.at_level("INFO"):
        folder, checkpoint = choose_run_folder(dataclasses.replace(RESUME, checkpoint=asked))
    assert (folder, checkpoint) == (tmp_path / "new", None)
    assert "no checkpoint to go on from, a new run begins" in caplog.text


def _hold(folder: str, started: Any, ended: Any) -> None:
    with filelock.FileLock(Path(folder) / ".lock"):
        started.set()
        ended.wait(30)


def test_two_jobs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), started, ended), daemon=True)
    other.start()
    assert started.wait(60)
    topology = read_topology({})
    with process_group(topology, timeout=60):
        with pytest.raises(ConfigError, match="another job writes there"):
            hold_run_folder(topology, tmp_path).__enter__()
        ended.set()
        other.join(30)
        with hold_run_folder(topology, tmp_path):
            assert (tmp_path / ".lock").exists()


def test_a_finished_run_that_goes_on_is_not_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert is_finished(tmp_path)
    config = RouterConfig(layers="2-3", calibrated=((0.5, 0.4),))
    save_routers(tmp_path / "routers", attach_routers(tiny_model(), config))
    reopen(tmp_path)
    assert not is_finished(tmp_path)
    assert "run megaskip calibrate again" in caplog.text
