"""Generate with a model and see what it skipped.

megaskip generate --model exported
megaskip generate --model runs/demo-attn_sequence-001 --prompts prompts.txt --picture what_ran
megaskip generate --model smaller

The last is what megaskip drop writes; any model folder works, to compare.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.generate import GenerateOptions


def main(argv: Sequence[str], prog: str = "megaskip generate") -> None:
    """Generate as the flags say."""
    options = parse(argv, prog)
    from megaskip.generation.job import generate

    generate(options)


def parse(argv: Sequence[str], prog: str = "megaskip generate") -> GenerateOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(GenerateOptions, argv, prog=prog, description=__doc__)
