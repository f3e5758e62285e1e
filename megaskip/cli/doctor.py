"""Print what a bug report needs: versions, devices, memory, disk, and whether ranks can talk.

    megaskip doctor
    torchrun --nproc_per_node 2 -m megaskip doctor    # all-reduce over these ranks
    megaskip doctor --json

Loads no model and writes nothing. Ends with status 2 when ranks cannot talk to each other.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.doctor import DoctorOptions


def main(argv: Sequence[str], prog: str = "megaskip doctor") -> None:
    """Examine this machine. Every rank calls it; the first one prints."""
    options = parse(argv, prog)
    from megaskip.doctor.job import examine

    examine(options)


def parse(argv: Sequence[str], prog: str = "megaskip doctor") -> DoctorOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(DoctorOptions, argv, prog=prog, description=__doc__)
