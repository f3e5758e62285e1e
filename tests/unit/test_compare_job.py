"""The job of `megaskip compare`: what is measured stays in files, for a second start and for other
ranks."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megaskip.config.commands.compare import CompareOptions
from megaskip.parallel.topology import LAUNCHER_VARIABLES
from megaskip.study.job import compare


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


def report_of(output: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output / "report.json").read_text())
    return {name: content[name] for name in ("points", "contrasts", "left_out")}


@contextlib.contextmanager
def launched(**variables: str) -> Iterator[None]:
    """Let a launcher have set these variables and no others in here."""
    others = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with mock.patch.dict(os.environ, others | variables, clear=True):
        yield


def test_ranks_share_out_the_work_and_a_second_start_measures_nothing_anew(
    options: CompareOptions,
) -> None:
    folder, names = options.output / "measured", ["dense-0.0000", "random-0.2500-s0"]
    names += ["random-0.2500-s1", "uniform-0.2500"]
    for rank in (1, 0):  # what they share are files, so they may follow each other
        with launched(RANK=str(rank), WORLD_SIZE="2"):
            compare(options)
        assert sorted(file.stem for file in folder.iterdir()) == (names[1::2] if rank else names)
    report = report_of(options.output)
    assert [point["method"] for point in report["points"]] == ["dense", "random", "uniform"]
    random = report["points"][1]
    assert (random["seeds"], random["tasks"].keys()) == (2, {"blimp", "words"})
    assert random["tasks"]["words"]["acc_norm"] == random["choice"]
    assert random["tasks"]["blimp"]["acc"] == random["pairs"]
    assert "words" in (options.output / "report.html").read_text()

    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "uniform-0.2500.npz").unlink()  # as if it had been stopped there
    with launched():
        compare(options)
    assert report_of(options.output) == report
    anew = [file.stem for file, time in written.items() if file.stat().st_mtime_ns != time]
    assert anew == ["uniform-0.2500"]
