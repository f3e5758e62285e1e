"""Turn published Router-Tuning or MindSkip routers into a router folder that load_routers takes.

    megaskip import-routers --source trained_folder --output my_routers
    megaskip import-routers --source model.safetensors --config base/config.json --output out

The source holds model.layers.N.router.weight, in safetensors or torch files, and the config.json
that training has saved. What it does not record is assumed and listed; what contradicts it is an
error.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.import_routers import ImportOptions


def main(argv: Sequence[str], prog: str = "megaskip import-routers") -> None:
    """Import as the flags say."""
    options = parse(argv, prog)
    from megaskip.export.job import import_routers

    import_routers(options)


def parse(argv: Sequence[str], prog: str = "megaskip import-routers") -> ImportOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(ImportOptions, argv, prog=prog, description=__doc__)
