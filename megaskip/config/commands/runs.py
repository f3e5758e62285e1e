"""Options of `megaskip runs`."""

from dataclasses import dataclass
from pathlib import Path

from megaskip.config.options import Checked, option


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsOptions(Checked):
    """Which run folders are listed, and how."""

    folder: Path = option(Path("runs"), metavar="FOLDER")
    """Folder that holds run folders, or a run folder; it may stand behind the command without the
    flag."""
    json: bool = False
    """Print JSON, for programs."""
