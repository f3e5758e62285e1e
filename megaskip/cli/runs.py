"""List run folders: what trained, capacity asked and realised, held-out loss, speed, date, state.

    megaskip runs
    megaskip runs path/to/runs --json

Reads what `megaskip train` writes; loads no model. Runs that did not end, and folders that cannot
be read, are listed as such.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.runs import RunsOptions


def main(argv: Sequence[str], prog: str = "megaskip runs") -> None:
    """Print the list."""
    options = parse(argv, prog)
    from megaskip.runs.job import list_runs

    list_runs(options)


def parse(argv: Sequence[str], prog: str = "megaskip runs") -> RunsOptions:
    """Return the options; raises ConfigError with every problem."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = f"--folder={arguments[0]}"
    return parse_options(
        RunsOptions, arguments, prog=prog, description=__doc__, usage="[FOLDER] [--json]"
    )
