"""The job of `megaskip bench`: choose parts, run them within the time, write the report."""

import datetime
import time
from pathlib import Path
from typing import Any

import torch

from megaskip.bench.parts import GPU, Part, parts_for
from megaskip.bench.records import DONE, Record, Records
from megaskip.bench.report import Report
from megaskip.bench.runner import Runner
from megaskip.config.checks import did_you_mean
from megaskip.config.commands.bench import BenchOptions
from megaskip.errors import ConfigError, MegaskipError
from megaskip.progress import progress_bar
from megaskip.reporting.summary import versions


def bench(options: BenchOptions) -> None:
    """Measure what `options` ask for, write the report, and print its tables.

    Raises ConfigError without a GPU where one is asked for, and MegaskipError, after the report,
    when a check has failed: then speed means nothing.
    """
    end = time.monotonic() + 60 * options.minutes
    parts = chosen_parts(options)
    if options.list:
        print("\n".join(part.name for part in parts))
        return
    if options.device == GPU and not torch.cuda.is_available():
        raise ConfigError(
            "bench gpu: torch sees no GPU here (torch.cuda.is_available() is False; `megaskip "
            "doctor` says what there is); `megaskip bench cpu` runs the same at small shapes"
        )
    records = Records(options.output or _new_folder(options.device))
    records.open(_about(options.device))
    report = Report(device=options.device, folder=records.folder, versions=versions())
    with progress_bar(total=len(parts), desc=f"bench {options.device}") as bar:

        def on_record(record: Record) -> None:
            report.add(record)
            report.write()
            bar.set_postfix_str(_short(record))
            bar.update()

        Runner(device=options.device, records=records, end=end, on_record=on_record).run(parts)
    report.draw()
    print(report.markdown())
    print(f"written: {records.folder}")
    if failed := report.failed_checks():
        raise MegaskipError(f"these checks failed: {', '.join(failed)}; see report.md")


def chosen_parts(options: BenchOptions) -> list[Part]:
    """Return the parts to run in their order: the machine always, for others are relative to it.

    Raises ConfigError for a text of --parts that is in no name.
    """
    parts = parts_for(options.device)
    names = [part.name for part in parts]
    for text in options.parts:
        if not any(text in name for name in names):
            raise ConfigError(
                f"--parts {text!r} is in no part's name{did_you_mean(text, names)} "
                f"(parts: {', '.join(names)})"
            )
    asked = options.parts or ("",)
    first, *others = parts
    return [first, *(part for part in others if any(text in part.name for text in asked))]


def _about(device: str) -> dict[str, Any]:
    """Return what figures of one report have in common."""
    return {"device": device, **versions()}


def _new_folder(device: str) -> Path:
    return Path(f"bench-{device}-{datetime.datetime.now():%Y%m%d-%H%M%S}")


def _short(record: Record) -> str:
    return record.name if record.status == DONE else f"{record.name}: {record.status}"
