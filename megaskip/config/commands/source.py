"""Options that several commands share: which routers, which text, how the base is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, exactly_one, option
from megaskip.config.run import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSource(Checked):
    """Which trained routers, on which base model: --run or --routers."""

    run: Path | None = option(None, metavar="FOLDER")
    """Run folder of `megaskip train`; it knows its base and data."""
    routers: Path | None = option(None, metavar="FOLDER")
    """Router folder (routers.safetensors, router_config.json)."""
    base: str | None = option(None, metavar="MODEL")
    """Base model, folder or hub id [what the routers name]."""
    trust_remote_code: bool = False
    """Run code that comes with the base model or the tokenizer, as --trust_remote_code of `megaskip
    train` has allowed it for the run."""

    def _problems(self) -> Iterator[str]:
        yield from exactly_one({"run": self.run, "routers": self.routers})


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource(Checked):
    """The calibration text, and how the base model reads it."""

    data: tuple[str, ...] = option((), metavar="PATH[:weight]")
    """Calibration text, as --data of `megaskip train`, repeatable [that of --run]."""
    dtype: str | None = option(None, choices=DTYPES)
    """Type of the base's weights in memory [that of --run; else as stored]."""
    seq_length: int | None = option(None, metavar="INT")
    """Longest row of the text in tokens [that of --run; else 512]."""

    def _problems(self) -> Iterator[str]:
        if self.seq_length is not None:
            yield from at_least("seq_length", self.seq_length, 8)
