"""Show what each row of the data becomes: text, prompt, learnt tokens, and why rows are dropped.

    megaskip inspect-data --model MODEL --data train.jsonl
    megaskip inspect-data --model MODEL --data train.jsonl --rows 0 --output rows.jsonl

The rows pass through the code that training reads them with, so what is shown is what is trained
on. It goes on behind a row at which training stops. Weights are not read.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.inspect_data import InspectOptions


def main(argv: Sequence[str], prog: str = "megaskip inspect-data") -> None:
    """Inspect as the flags say."""
    options = parse(argv, prog)
    from megaskip.inspection.job import print_inspection

    print_inspection(options)


def parse(argv: Sequence[str], prog: str = "megaskip inspect-data") -> InspectOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(InspectOptions, argv, prog=prog, description=__doc__ or "")
