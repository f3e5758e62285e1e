"""Bars on a terminal, lines of the log elsewhere."""

import io
import logging
import time

import pytest

from megaskip import progress
from megaskip.progress import ProgressBatches, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_log_has_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.04)
    with caplog.at_level(logging.INFO, "megaskip"):
        for _ in ProgressBatches(range(10), "costs"):
            for _ in ProgressBatches(range(1), "a pass"):
                time.sleep(0.01)
    assert lines(caplog)
    assert all(
        line.startswith("costs: ") and " of 10, 00:00 so far" in line for line in lines(caplog)
    )
    with caplog.at_level(logging.INFO, "megaskip"), progress_bar(desc="bytes") as bar:
        for _ in range(10):
            time.sleep(0.01)
            bar.update(3)
    assert "bytes: " in lines(caplog)[-1] and " of " not in lines(caplog)[-1]


def test_work_that_is_soon_done_writes_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "megaskip"):
        assert list(ProgressBatches("abc", "letters")) == list("abc")
    assert (lines(caplog), capfd.readouterr().err) == ([], "")


def test_a_terminal_has_a_bar_unless_it_is_switched_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with caplog.at_level(logging.INFO, "megaskip"):
        list(ProgressBatches("abc", "hidden", disable=True))
        assert terminal.getvalue() == ""
        list(ProgressBatches("abc", "letters"))
    assert "letters" in terminal.getvalue()
    assert lines(caplog) == []
