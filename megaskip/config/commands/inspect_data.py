"""Options of `megaskip inspect-data`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.config.checks import at_least
from megaskip.config.options import Checked, option
from megaskip.config.paths import output_file_problems
from megaskip.config.run import DataConfig, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(Checked):
    """What each row of the data becomes, and why."""

    rows: int = 5
    """Rows to print, chosen at random (by --seed) from all that are used; dropped rows come on top,
    up to 3 for each reason."""
    output: Path | None = option(None, metavar="FILE.jsonl")
    """Write all rows, one JSON object on each line: text, prompt, learnt, dropped, reason and
    more."""
    seed: int = 0
    """Seed of the data's order, as in training."""
    prompt_tokens: int = 32
    """As in training: of a row without a prompt, a router reads this many tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def _problems(self) -> Iterator[str]:
        yield from at_least("rows", self.rows, 0)
        yield from at_least("prompt_tokens", self.prompt_tokens, 1)
        if self.output is not None:
            yield from output_file_problems(self.output, ".jsonl")
