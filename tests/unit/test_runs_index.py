"""The list of runs says what each folder says of itself, and which cannot be read."""

import json
import os
from pathlib import Path

import pytest
from test_training_loop import stop_after
from tiny_run import alone, router_trainer, tiny_config

from megaskip.cli.runs import main
from megaskip.errors import ConfigError
from megaskip.training.run_folder import write_run_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a finished run, one that was stopped, a damaged one, and no run."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny_config()
    with alone() as topology:
        for name in ("finished", "stopped"):
            trainer = router_trainer(root / name, topology, config)
            write_run_file(root / name, config, 1)
            if name == "stopped":
                stop_after(trainer, step=4)
            trainer.run()
    (root / "damaged").mkdir()
    (root / "damaged/run.json").write_text("{")
    for day, name in enumerate(("finished", "stopped", "damaged"), start=1):
        os.utime(root / name / "run.json", (86400 * day, 86400 * day))
    (root / "none").mkdir()
    return root


def test_runs_are_listed_as_they_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder), "--json"])
    runs = {run["folder"]: run for run in json.loads(capsys.readouterr().out)}
    assert list(runs) == ["damaged", "finished", "stopped"]
    finished, stopped = runs["finished"], runs["stopped"]
    report = json.loads((folder / "finished/report.json").read_text())
    assert finished["state"] == "finished" and finished["step"] == 6
    assert finished["loss"] == report["held_out"]["loss_routed"]
    assert finished["capacity"] == report["held_out"]["capacity"]
    assert finished["asked_capacity"] == 0.5 and finished["trains"] == "attn_sequence"
    assert stopped["state"] == "unfinished" and stopped["step"] == 4
    assert stopped["loss"] is not None and stopped["tokens_per_second"] > 0
    assert runs["damaged"]["state"].startswith("damaged: ")
    assert runs["damaged"]["model"] is None
    main(["--folder", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["run", "begun", "model", "trains"]
    assert lines[2].startswith("finished  1970-01-02") and lines[2].endswith("finished, step 6")
    assert lines[3].endswith("unfinished, step 4")


@pytest.mark.parametrize(("name", "message"), [("none", "no run in it"), ("nowhere", "no such")])
def test_a_folder_without_runs_is_one_message(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(folder / name)])
