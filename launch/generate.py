"""Generate with a routed model and see what it skipped.

python launch/generate.py --model exported
python launch/generate.py --model runs/demo-attn_sequence-001 --prompts prompts.txt --picture what
python launch/generate.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("generate", prog="launch/generate.py")
