"""The data that ship with megaskip, and the name that stands for them."""

import dataclasses
from pathlib import Path

from megaskip.config import DataConfig
from megaskip.config.run import DEMO

DEMO_DATA = Path(__file__).parents[1] / "demo" / "instruct.jsonl"


def with_demo(config: DataConfig) -> DataConfig:
    """Return `config` with "demo" or "demo:weight" in --data replaced by the path of the file."""
    entries = tuple(
        f"{DEMO_DATA}{entry.removeprefix(DEMO)}"
        if entry == DEMO or entry.startswith(f"{DEMO}:")
        else entry
        for entry in config.data
    )
    return dataclasses.replace(config, data=entries)
