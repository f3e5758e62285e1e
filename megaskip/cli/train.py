r"""Router-tune a frozen model, or train a small one whole.

    megaskip train --dtype float32 --max_steps 50
    deepspeed launch/train.py --ds_config ds_configs/zero3.json
    torchrun --nproc_per_node 4 launch/train.py --ds_config ds_configs/pipeline.json \
        --pipeline_stages 2
"""

from collections.abc import Sequence

from megaskip.config import RunConfig, parse_run_config


def main(argv: Sequence[str], prog: str = "megaskip train") -> None:
    """Train as the flags say. Every rank calls it."""
    config = parse(argv, prog)
    from megaskip.training.job import train

    train(config)


def parse(argv: Sequence[str], prog: str = "megaskip train") -> RunConfig:
    """Return the run; raises ConfigError with every problem."""
    return parse_run_config(argv, __doc__ or "", prog=prog)
