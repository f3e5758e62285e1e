"""The console script `megaskip`: names its commands and hands over to one of them.

Nothing heavy is imported before a command is chosen, so that help is answered at once.
"""

import importlib
import sys
from collections.abc import Sequence

from megaskip.cli.run import run_cli

COMMANDS = {
    "train": ("megaskip.cli.train", "router-tune a frozen model"),
    "evaluate": ("megaskip.cli.evaluate", "lm-eval tasks, routed beside dense"),
    "generate": ("megaskip.cli.generate", "text from a routed model, and what ran for it"),
    "calibrate": ("megaskip.cli.calibrate", "thresholds of trained routers for asked capacities"),
    "convert": ("megaskip.cli.convert", "a run to a Hugging Face folder"),
    "export-static": ("megaskip.cli.export_static", "drop sublayers for good"),
    "import-routers": ("megaskip.cli.import_routers", "take in published routers"),
    "compare": ("megaskip.cli.compare", "ways to skip, at equal skip"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that `argv` (sys.argv without it) names."""
    argv = sys.argv[1:] if argv is None else argv
    module, _ = COMMANDS[argv[0]]
    run_cli(importlib.import_module(module).main, argv[1:])
