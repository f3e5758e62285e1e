"""megaskip train: flags to a run."""

from collections.abc import Sequence

from megaskip.config import parse_run_config


def main(argv: Sequence[str]) -> None:
    """Train as the flags say. Every rank calls it."""
    config = parse_run_config(
        argv, description="Router-tune a frozen model, or train a small one whole."
    )
    from megaskip.training.job import train

    train(config)
