r"""Print what `megaskip train` would do and need, without loading weights or starting ranks.

    megaskip plan --world_size 16 --ds_config ds_configs/zero3.json \
        --model path/to/Meta-Llama-3-70B --seq_length 4096 --micro_batch_size 1 --max_steps 100

Reads the model's config.json and, where there are any, the headers of its weight files. The flags
are those of `megaskip train`.
"""

from collections.abc import Sequence

from megaskip.config import RunConfig, parse_run_config


def main(argv: Sequence[str], prog: str = "megaskip plan") -> None:
    """Plan as the flags say."""
    config = parse(argv, prog)
    from megaskip.training.job import train

    train(config)


def parse(argv: Sequence[str], prog: str = "megaskip plan") -> RunConfig:
    """Return the dry run; raises ConfigError with every problem."""
    return parse_run_config(argv, __doc__ or "", prog=prog, fixed={"dry_run": True})
