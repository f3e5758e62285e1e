"""Options of `megaskip bench`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import finite
from megaskip.config.options import Checked, option

DEVICES = ("gpu", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(Checked):
    """How fast this machine is, and with how much memory."""

    device: str = option(choices=DEVICES)
    """What is measured; `megaskip bench gpu` says the same."""
    minutes: float = 8.0
    """Time for everything; parts that do not fit are left out, and listed."""
    output: Path | None = option(None, metavar="FOLDER")
    """Folder to write, or to go on in: parts that are done are taken as they are
    [bench-DEVICE-DATE-TIME]."""
    parts: tuple[str, ...] = option((), separator=",", metavar="TEXT,...")
    """Run only parts whose names hold one of these texts, as in train-llama3-8b,serve [all]."""
    list: bool = False
    """Print the names of all parts in the order in which they are run, and end."""

    def _problems(self) -> Iterator[str]:
        yield from finite("minutes", self.minutes)
        if self.minutes <= 0:
            yield f"--minutes {self.minutes:g} must be above 0"
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            yield f"--output {self.output}: this is a file; name a folder"
