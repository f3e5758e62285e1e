"""Drop layers for every text, with a small map in each one's place, in closed form.

    megaskip fit --model path/to/model --data text.jsonl --drop 25 --output fitted
    torchrun --nproc_per_node 8 -m megaskip fit --ds_config ds_configs/zero3.json \\
        --model path/to/model --data text.jsonl --drop 12.5 --output fitted

One forward pass fits a map from what a sublayer reads to what it adds, for every candidate
(reduced-rank ridge regression); then the layers to drop are chosen by measured loss. OUTPUT is a
router folder: `megaskip train --init_routers OUTPUT --distill 0.5` trains the maps together, which
halves what is lost, and `megaskip export-static --routers OUTPUT` writes a Hugging Face folder.
`megaskip drop` does all three.

What is done so far is kept in OUTPUT.partial.safetensors: the same command on as many ranks goes on
after a stop, and ends with the same numbers.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.fit import FitOptions


def main(argv: Sequence[str], prog: str = "megaskip fit") -> None:
    """Run the job that the flags describe."""
    options = parse(argv, prog)
    from megaskip.calibration.fit_job import fit

    fit(options)


def parse(argv: Sequence[str], prog: str = "megaskip fit") -> FitOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(FitOptions, argv, prog=prog, description=__doc__)
