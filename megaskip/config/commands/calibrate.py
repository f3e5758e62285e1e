"""Options of `megaskip calibrate`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaskip.config.checks import at_least, share_hint
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.options import Checked, option


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions(Checked):
    """Thresholds of trained routers for asked capacities."""

    source: RouterSource
    capacity: tuple[float, ...] = option(separator=",", metavar="SHARE,...")
    """Shares to keep, such as 0.8,0.6,0.4."""
    text: TextSource
    eval_data: tuple[str, ...] = option((), metavar="PATH[:weight]")
    """Text on which the capacities are checked, repeatable [carved off the calibration text]."""
    rows: int = 4096
    """Rows to calibrate on."""
    allocate: int = option(0, metavar="ROUNDS")
    """Give each layer its own threshold, in this many rounds, each of a forward pass a layer over
    --rows; 2 are enough, 0 gives all layers the same."""
    micro_batch_size: int = 4
    """Rows per rank and forward pass, as in training."""
    ds_config: str | None = option(None, metavar="JSON")
    """DeepSpeed JSON that owns sharding, as in training."""
    output: Path | None = option(None, metavar="FOLDER")
    """Folder to write [the router folder itself]."""

    def _problems(self) -> Iterator[str]:
        if not self.capacity:
            yield "--capacity names no share; give shares such as 0.8,0.6,0.4"
        for capacity in self.capacity:
            if not 0 < capacity < 1:
                problem = f"--capacity {capacity:g} must lie inside (0, 1): 1 is the base model"
                yield problem + share_hint(capacity)
        yield from at_least("rows", self.rows, 1)
        yield from at_least("allocate", self.allocate, 0)
        yield from at_least("micro_batch_size", self.micro_batch_size, 1)
