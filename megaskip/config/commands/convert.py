"""Options of `megaskip convert`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaskip.config.commands.hub import HubTarget
from megaskip.config.commands.source import RouterSource
from megaskip.config.options import Checked, option
from megaskip.config.routing import KV_CHOICES

MODES = ("overlay", "copy", "adapter")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(Checked):
    """A trained run to a Hugging Face folder."""

    source: RouterSource
    tokenizer: str | None = option(None, metavar="TOKENIZER")
    """Tokenizer, folder or hub id [with --run: what it was trained with; else the base's]."""
    output: Path = option(metavar="FOLDER")
    """New folder to write."""
    mode: str = option("overlay", choices=MODES)
    """overlay: hard links to the base's shards and one shard of routers; copy: stands by itself;
    adapter: the routers alone."""
    kv: str = option("keep", choices=KV_CHOICES)
    """attn_token, block_token: skipped tokens are still attended to (keep, as trained) or not
    (drop, which saves their keys and values)."""
    merge: bool = False
    """Of routers that were trained with LoRA: add the adapter to the weights that it adapts, which
    are then written anew; without it the folder has adapter/, which peft loads on the model."""
    verify: bool = False
    """Load it in a fresh process and compare logits."""
    hub: HubTarget = field(default_factory=HubTarget)

    def _problems(self) -> Iterator[str]:
        if self.verify and self.mode == "adapter":
            yield "--verify loads a whole folder; an adapter is loaded with its base"
        if self.merge and self.mode == "adapter":
            yield "--merge writes weights anew; --mode adapter has none of the base"
