"""From a model to a smaller one: drop layers, put small maps in their places, train those.

    megaskip drop --model path/to/model --data text.jsonl --drop 25 --output smaller
    megaskip drop --model path/to/model --data text.jsonl --drop 25 --nproc 8 --output smaller
    megaskip drop --model path/to/model --data text.jsonl --drop 25 --lora_rank 16 --output smaller

Runs `megaskip fit`, `megaskip train --init_routers` and `megaskip export-static`, and prints each
command. Only the maps train, and with --lora_rank adapters of all layers that stay, which are then
merged into the weights. What is done is kept in --work_dir, so a command that was interrupted
goes on when it is given again. OUTPUT loads with transformers alone.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.fit import DropOptions


def main(argv: Sequence[str], prog: str = "megaskip drop") -> None:
    """Run the job that the flags describe."""
    options = parse(argv, prog)
    from megaskip.runs.drop import drop

    drop(options)


def parse(argv: Sequence[str], prog: str = "megaskip drop") -> DropOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(DropOptions, argv, prog=prog, description=__doc__)
