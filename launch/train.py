"""Router-tune a frozen model.

deepspeed launch/train.py --ds_config ds_configs/zero3.json
torchrun --nproc_per_node 2 launch/train.py --ds_config ds_configs/zero3.json
python launch/train.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("train", prog="launch/train.py")
