"""Options of `megaskip import-routers`."""

from dataclasses import dataclass
from pathlib import Path

from megaskip.config.options import Checked, option
from megaskip.config.routing import SUBLAYER_GRANULARITIES


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions(Checked):
    """Published routers to a router folder."""

    source: Path = option()
    """Folder or weight file that holds model.layers.N.router.weight."""
    output: Path = option(metavar="FOLDER")
    """Router folder to write."""
    config: Path | None = option(None, metavar="config.json")
    """The base model's config.json [the one beside the weights]."""
    granularity: str | None = option(None, choices=SUBLAYER_GRANULARITIES, metavar="GRANULARITY")
    """What they skip, when config.json lacks it: attn, mlp or block, _sequence or _token."""
