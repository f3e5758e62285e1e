"""Routers in closed form: each one predicts what skipping a unit costs, in nats. No training.

    megaskip fit-routers --model path/to/model --data text.jsonl --capacity 0.9,0.75 --output fitted
    torchrun --nproc_per_node 8 -m megaskip fit-routers --ds_config ds_configs/zero3.json \\
        --model path/to/model --data text.jsonl --granularity attn_token --output fitted

One forward pass fits a map from what a sublayer reads to what it adds (--compensation). Gradients
of the loss with respect to each gate say what skipping a unit costs, and a ridge regression for
each layer predicts this cost from what the router reads. Scores of all layers are then comparable,
so one threshold skips what is cheapest; it is found for each --capacity, and checked on held-out
text. OUTPUT is a router folder: `megaskip convert --routers OUTPUT` writes a Hugging Face folder,
and `megaskip train --init_routers OUTPUT --freeze_routers --distill 0.5` trains its maps.

What is done so far is kept in OUTPUT.partial.safetensors: the same command on as many ranks goes on
after a stop, and ends with the same numbers.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.fit_routers import FitRoutersOptions


def main(argv: Sequence[str], prog: str = "megaskip fit-routers") -> None:
    """Run the job that the flags describe."""
    options = parse(argv, prog)
    from megaskip.calibration.router_fit_job import fit_routers_job

    fit_routers_job(options)


def parse(argv: Sequence[str], prog: str = "megaskip fit-routers") -> FitRoutersOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(FitRoutersOptions, argv, prog=prog, description=__doc__)
