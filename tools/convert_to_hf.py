"""Write a trained run as a Hugging Face folder: `megaskip convert`, from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("convert", prog="tools/convert_to_hf.py")
