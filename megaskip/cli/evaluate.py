"""Evaluate a routed model with lm-eval, beside its unrouted base.

    megaskip evaluate --model runs/demo-attn_sequence-001 --tasks demo --output eval.json
    torchrun --nproc_per_node 8 launch/evaluate.py --model exported --tasks arc_easy,gsm8k \\
        --output eval.json

The same requests are answered with every gate open, and the difference is paired by document.

tasks: demo (demo_choice, demo_answers, demo_text: made for the embedded demo; use
       --apply_chat_template), local_blimp, local_arc_easy, local_arc_challenge, local_boolq,
       local_openbookqa, local_copa (read JSON lines under --data_dir), those under --include_path,
       and lm-eval's own (which download their data)

Under torchrun or deepspeed every rank holds the model and takes its share of the requests. For
models that fit no single GPU the weights are sharded by ZeRO-3 (--ds_config) or spread over stages
(--pipeline_stages). The results do not depend on the number of ranks.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.evaluate import EvaluateOptions


def main(argv: Sequence[str], prog: str = "megaskip evaluate") -> None:
    """Evaluate as the flags say. Every rank calls it."""
    options = parse(argv, prog)
    from megaskip.evaluation.job import evaluate

    evaluate(options)


def parse(argv: Sequence[str], prog: str = "megaskip evaluate") -> EvaluateOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(EvaluateOptions, argv, prog=prog, description=__doc__)
