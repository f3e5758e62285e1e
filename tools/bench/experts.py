"""Learnt routers of experts beside experts dropped for good and tokens skipped by chance, at equal
shares of all (token, expert) pairs, on held-out text.

    python tools/bench/experts.py --model MODEL --data text.jsonl --runs run-s0 run-s1

tools/make/make_mixture.py makes a small mixture. Prints a table, in nats a token over the dense
model.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaskip.calibration.capacities import calibrate_all
from megaskip.calibration.expert_load import measure_load
from megaskip.calibration.opened import Opened, opened, topology_of
from megaskip.checkpoint.routers import fill_routers, read_router_config
from megaskip.cli.run import run_cli
from megaskip.config.commands.fit import TextAndModel
from megaskip.log import quiet_libraries
from megaskip.study.expert_drops import StaticDrop, order_by_load, order_by_loss, random_drop

Losses = dict[str, list[float]]
"""By way to skip, the held-out loss with each seed."""


def main(argv: Sequence[str]) -> None:
    """Measure every way at every share and print the table."""
    options = _parse(argv)
    quiet_libraries()
    base = TextAndModel(
        model=options.model,
        data=tuple(options.data),
        eval_data=tuple(options.eval_data),
        held_out=options.held_out,
        seq_length=options.seq_length,
        dtype="float32",
    )
    trained, layers, _ = read_router_config(options.runs[0] / "routers")
    config = dataclasses.replace(trained, layers=layers, threshold=0.5, calibrated=())
    config = dataclasses.replace(config, capacity_low=None, router="affine")
    with opened(base, lambda depth: config, topology_of(base)) as job:
        table = measure(job, options.runs, [share / 100 for share in options.skip], options)
    dense = table.pop("dense")
    print(f"dense: {dense:.4f} nats a token")
    for share, losses in table.items():
        for way, values in losses.items():
            rest = [f"{value - dense:+.4f}" for value in values]
            print(f"{share}  {way:<16} {statistics.mean(values) - dense:+.4f}  ({', '.join(rest)})")
    if options.json:
        options.json.write_text(json.dumps({"dense": dense, **table}, indent=2))


def measure(
    job: Opened, runs: Sequence[Path], shares: Sequence[float], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the loss of the dense model, and by share those of each way."""
    engine, seeds = job.engine, range(len(runs))
    text = job.loader.calibration(options.rows)
    order_text = job.loader.calibration(options.order_rows)
    held_out = [batch for batch in job.loader.held_out() if batch is not None]
    fresh = engine.routers.config
    losses = {f"{share:.1%}": Losses() for share in shares}
    with tqdm(desc="experts", unit="pass", disable=None) as bar:
        by_loss = order_by_loss(engine, order_text, progress=bar.update)
    orders = {"by loss": by_loss, "by load": order_by_load(measure_load(engine, text))}
    drops = {f"static, {k}": StaticDrop(engine, held_out, order) for k, order in orders.items()}
    for share in shares:
        of_share = losses[f"{share:.1%}"]
        for name, drop in drops.items():
            of_share[name] = [drop.at(share).loss]
        drawn = [random_drop(engine, held_out, share, seed).loss for seed in seeds]
        of_share["random"] = drawn
    for run in runs:
        fill_routers(run / "routers", engine.routers)
        engine.routers.configure(fresh)
        result = calibrate_all(engine, text, held_out, [1 - share for share in shares])
        for problem in result.problems:
            print(f"{run}: {problem}")
        for point in result.points:
            losses[f"{1 - point.capacity:.1%}"].setdefault("ours", []).append(point.loss)
            print(f"{run}: asked {1 - point.capacity:.1%}, skips {1 - point.held_out:.1%}")
    return {"dense": engine.evaluate(held_out, routed=False).loss, **losses}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="the mixture")
    add("--data", nargs="+", required=True, help="text to calibrate on and to choose experts by")
    add("--eval_data", nargs="*", default=[], help="text to measure on [carved off]")
    add("--runs", nargs="+", type=Path, required=True, help="runs of megaskip train, one a seed")
    add("--skip", nargs="+", type=float, default=[12.5, 25, 50], help="percent of all pairs")
    add("--rows", type=int, default=128, help="of text to calibrate on")
    add("--order_rows", type=int, default=64, help="of text to measure single experts on")
    add("--held_out", type=int, default=256, help="rows to measure on, if --eval_data is not given")
    add("--seq_length", type=int, default=256)
    add("--json", type=Path, help="write the losses there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
