"""The job of `megaskip runs`: find the runs, and print a table or JSON."""

import dataclasses
import json

from megaskip.config.commands.runs import RunsOptions
from megaskip.runs.index import find_runs, run_table


def list_runs(options: RunsOptions) -> None:
    """Print the runs in a folder, oldest first; raises ConfigError where there is none."""
    runs = find_runs(options.folder)
    if options.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=2))
    else:
        print("\n".join(run_table(runs)))
