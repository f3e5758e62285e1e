"""What a report says: records in, report.json, report.md and report.png out."""

import datetime
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaskip.bench.records import DONE, FAILED, LEFT_OUT, Record
from megaskip.bench.setup import Row
from megaskip.bench.tables import (
    call_table,
    memory_table,
    sanity_table,
    serve_table,
    stack_table,
    train_table,
)
from megaskip.checkpoint.atomic import write_json

_TRAINING = """\
Steps by the engines of `megaskip train`; every token has a loss. LoRA: rank 16 on every projection.
"Time / router-tuning" is a ratio of medians of one report, for methods are measured one model at a
time; "tokens/s / first case" is the median of paired ratios to the first case of the same model;
"+-" are standard errors, which need two runs. MFU: FLOPs that the method needs (causal attention,
nothing computed twice) over the time and the measured matrix product peak.
"""
_SERVING = """\
"x dense" is the median of paired ratios to dense runs, with its standard error; above 1 is faster.
"Dropped" has the same sublayers taken out for good. "Ideal" is what FLOPs allow in prefill, and in
decode the bytes of weights, keys and values that a step moves; a cache that grows reads and writes
all of its keys and values once more to make room. Half of the layers are routed. Kept shares are of
their units; at one row they are layers, at several rows each keeps other layers. "Static" decodes
on a static cache, as `generate(cache_implementation="static")` does: a GPU records the third step
and plays it back, so the first three stand apart. How near skipping comes to what its bytes allow
is "of bandwidth" of "static, all skipped" over that of "static, everything runs".
"""
_CALLS = """\
Launches are kernels, copies and graphs that the host gives to the GPU. On a CPU there are none, and
waits are reads of numbers and of indices, without the optimizer's: on a GPU at most so many wait.
"""


@dataclass(slots=True, kw_only=True)
class Report:
    """All records so far, and what is written of them."""

    device: str
    folder: Path
    versions: dict[str, str]
    _records: dict[str, Record] = field(default_factory=dict)
    _date: str = field(default_factory=lambda: f"{datetime.datetime.now():%Y-%m-%d %H:%M}")
    _picture: str = ""

    def add(self, record: Record) -> None:
        """Take in a record."""
        self._records[record.name] = record

    def rows(self, table: str) -> list[Row]:
        """Return the rows of a table, in the order of the parts."""
        return [
            row for record in self._records.values() for row in record.rows if row["table"] == table
        ]

    def failed_checks(self) -> list[str]:
        """Return the names of the checks that did not pass."""
        return [row["check"] for row in self.rows("sanity") if not row["passed"]]

    def write(self) -> None:
        """Write report.json and report.md."""
        content = {
            "about": self._about(),
            "parts": {name: asdict(record) for name, record in self._records.items()},
        }
        write_json(self.folder / "report.json", content)
        (self.folder / "report.md").write_text(self.markdown(), encoding="utf-8")

    def draw(self) -> None:
        """Write report.png; without matplotlib the report says that there is none."""
        if find_spec("matplotlib") is None:
            self._picture = "no picture: matplotlib is not installed (megaskip[report])"
        else:
            # Imported where it is known to be there: it is an extra.
            from megaskip.bench.picture import draw

            draw(self.rows("train"), self.rows("serve"), self._title(), self.folder / "report.png")
        self.write()

    def markdown(self) -> str:
        """Return the text of report.md."""
        return "\n".join(self._sections())

    def _sections(self) -> Iterator[str]:
        yield f"# {self._title()}\n"
        about = self._about()
        yield "".join(f"- {name}: {value}\n" for name, value in about.items())
        tables = (
            ("Checks", "", "sanity", sanity_table),
            ("Training", _TRAINING, "train", train_table),
            (
                "Deep models, extrapolated",
                "A straight line through two depths; no communication between devices.\n",
                "stack",
                stack_table,
            ),
            ("Memory of a training step, GiB", "", "train", memory_table),
            ("Prefill and decode", _SERVING, "serve", serve_table),
            ("Launches, waits and memory", _CALLS, "serve", call_table),
        )
        for title, text, name, table in tables:
            if rows := self.rows(name):
                yield (
                    f"## {title}\n\n{text}\n{table(rows)}"
                    if text
                    else f"## {title}\n\n{table(rows)}"
                )
        yield from self._missing()

    def _missing(self) -> Iterator[str]:
        """Yield what a reader may look for in vain, with the reasons."""
        for status, title in ((FAILED, "Failed"), (LEFT_OUT, "Left out")):
            records = [r for r in self._records.values() if r.status == status]
            lines = [f"- {record.name}: {record.reason}\n" for record in records]
            if self._picture and status == LEFT_OUT:
                lines.append(f"- {self._picture}\n")
            if lines:
                yield f"## {title}\n\n{''.join(lines)}"

    def _title(self) -> str:
        machine = self.rows("machine")
        return f"megaskip bench: {machine[0]['device'] if machine else self.device}"

    def _about(self) -> dict[str, Any]:
        done = [record for record in self._records.values() if record.status == DONE]
        about: dict[str, Any] = {
            "date": self._date,
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            "parts": f"{len(done)} of {len(self._records)} done, "
            f"{sum(record.seconds for record in self._records.values()):.0f} s",
        }
        for row in self.rows("machine"):
            about["type"] = row["dtype"]
            about["clock"] = row["clock"]
            about["matrix product, measured"] = f"{row['flops'] / 1e12:.2f} TFLOP/s"
            about["copy, measured"] = f"{row['bandwidth'] / 1e9:.1f} GB/s, read and written"
            about["memory"] = f"{row['memory_bytes'] / 2**30:.0f} GiB"
        return about
