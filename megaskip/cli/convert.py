"""Turn a trained run into a Hugging Face folder that loads with torch and transformers alone.

    megaskip convert --run runs/demo-attn_sequence-001 --output exported --verify
    megaskip convert --routers my_routers --base path/to/base --output exported

overlay (default) hard-links the base's shards, so that a 70B takes a second; copy stands by itself;
adapter holds the routers alone.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.convert import ConvertOptions


def main(argv: Sequence[str], prog: str = "megaskip convert") -> None:
    """Convert as the flags say."""
    options = parse(argv, prog)
    from megaskip.export.job import convert

    convert(options)


def parse(argv: Sequence[str], prog: str = "megaskip convert") -> ConvertOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(ConvertOptions, argv, prog=prog, description=__doc__)
