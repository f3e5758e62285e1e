"""Published Router-Tuning or MindSkip routers to a router folder that load_routers takes.

    python tools/import_routers.py --source trained_folder --output my_routers
    python tools/import_routers.py --source model.safetensors --config base/config.json --output out

The source holds model.layers.N.router.weight, in safetensors or torch files, and the config.json
that training has saved. What it does not record is assumed and listed; what contradicts it is an
error.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megaskip.config import GRANULARITIES
from megaskip.export.published import import_published
from megaskip.reporting.summary import table


def main(argv: Sequence[str]) -> None:
    """Import and print the report."""
    options = parse(argv)
    report = import_published(
        options.source, options.output, config=options.config, granularity=options.granularity
    )
    rows = [("source", str(options.source)), *report.rows()]
    print("\n".join(table(rows, title="imported published routers")))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder or weight file")
    parser.add_argument("--output", type=Path, required=True, help="router folder to write")
    parser.add_argument("--config", type=Path, help="config.json [the one beside the weights]")
    parser.add_argument(
        "--granularity",
        metavar="G",
        help=f"what they skip, when config.json lacks it: {', '.join(GRANULARITIES)}",
    )
    return parser.parse_args(argv)
