"""Options of `megaskip export-static`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.config.checks import at_least
from megaskip.config.commands.hub import HubTarget
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.options import Checked, exactly_one, option

FORMATS = ("hf", "decilm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportStaticOptions(Checked):
    """Sublayers that are dropped for good."""

    source: RouterSource
    text: TextSource
    tokenizer: str | None = option(None, metavar="TOKENIZER")
    """Tokenizer, folder or hub id [with --run: what it was trained with; else the base's]."""
    chat_template: str | None = option(None, metavar="FILE.jinja")
    """A jinja file that replaces the tokenizer's chat template in the folder."""
    rows: int = 256
    """Rows of the text to measure on."""
    below: float | None = option(None, metavar="SHARE")
    """Drop what runs less often than this, a share such as 0.3."""
    count: int | None = None
    """Drop this many sublayers, those that run least."""
    layers: str | None = option(None, metavar="SPEC")
    """Drop these, e.g. 4,5; measured only if --data is given. None of --below, --count and --layers
    is needed for routers of --budget static: their layers never run."""
    format: str = option("hf", choices=FORMATS)
    """hf loads with transformers; decilm in vLLM (llama and mistral bases)."""
    without_compensation: bool = False
    """Leave out the maps that routers have for what they skip: nothing then stands where sublayers
    were (what decilm needs)."""
    merge: bool = False
    """Of routers that were trained with LoRA: add the adapter to the weights that stay, which are
    then written anew."""
    output: Path = option(metavar="FOLDER")
    """New folder to write."""
    verify: bool = False
    """Load it in a fresh process and compare logits (hf)."""
    hub: HubTarget = field(default_factory=HubTarget)

    def _problems(self) -> Iterator[str]:
        ways = {"below": self.below, "count": self.count, "layers": self.layers}
        if any(value is not None for value in ways.values()):  # none: what a static budget drops
            yield from exactly_one(ways)
        yield from at_least("rows", self.rows, 1)
        if self.verify and self.format != "hf":
            yield "--verify loads the folder with transformers, which has no DeciLM; use hf"
