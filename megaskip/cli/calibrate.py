"""Let one set of routers serve many capacities: find the threshold of each on calibration text.

    megaskip calibrate --run runs/demo-attn_sequence-001 --capacity 0.8,0.6,0.4
    deepspeed tools/calibrate.py --routers my_routers --base path/to/base --data text.jsonl \\
        --capacity 0.75,0.5 --ds_config ds_configs/zero3.json --output calibrated

With --allocate 2 each layer gets its own threshold, so that the calibration text loses least: it
measures, twice, what skipping costs in each layer. For decisions per sequence.

The table goes into router_config.json, and with it into what `megaskip convert` writes; then
model.set_capacity(0.6) chooses. Routers that were trained with --capacity_low do this best.
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.calibrate import CalibrateOptions


def main(argv: Sequence[str], prog: str = "megaskip calibrate") -> None:
    """Calibrate as the flags say. Every rank calls it."""
    options = parse(argv, prog)
    from megaskip.calibration.job import calibrate

    calibrate(options)


def parse(argv: Sequence[str], prog: str = "megaskip calibrate") -> CalibrateOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(CalibrateOptions, argv, prog=prog, description=__doc__)
