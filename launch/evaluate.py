r"""Evaluate a routed model beside its unrouted base.

python launch/evaluate.py --model runs/demo-attn_sequence-001 --tasks demo --output eval.json
torchrun --nproc_per_node 8 launch/evaluate.py --model exported \
    --tasks arc_easy,gsm8k --output eval.json
deepspeed launch/evaluate.py --ds_config ds_configs/zero3.json --model exported \
    --tasks hellaswag --output eval.json
python launch/evaluate.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.cli.main import run_command  # noqa: E402

if __name__ == "__main__":
    run_command("evaluate", prog="launch/evaluate.py")
