"""lm-eval's own command line with megaskip's model in it.

python -m megaskip.evaluation --model megaskip --model_args pretrained=exported --tasks arc_easy
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import megaskip.evaluation.lm  # noqa: F401  registers the model
from megaskip.errors import ConfigError
from megaskip.evaluation.task_manager import DocumentwiseManager
from megaskip.extras import extra

with extra("eval"):
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate


def main(argv: Sequence[str]) -> None:
    """Run lm-eval's command line; few-shot examples are drawn by document."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "lm-eval's own command line runs on one rank; start launch/evaluate.py with torchrun "
            "or deepspeed instead"
        )
    lm_eval.tasks.TaskManager = DocumentwiseManager
    sys.argv = ["python -m megaskip.evaluation", *argv]
    if not any(flag.startswith("--include_path") for flag in argv):
        sys.argv += ["--include_path", str(Path(__file__).parents[1] / "evaluation" / "tasks")]
    cli_evaluate()
