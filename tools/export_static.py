"""Drop sublayers for good: `megaskip export-static`, from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("export-static", prog="tools/export_static.py")
