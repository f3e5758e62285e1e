"""Does routing pay? Held-out quality at equal skip: dense, dropped, random, published, ours.

    python tools/compare.py --model path/to/model --data train.jsonl --eval_data heldout.jsonl \\
        --blimp path/to/blimp --skip 12.5,25,37.5,50 --seeds 0,1,2 --output comparison

Trains what is to be trained (runs that exist are taken as they are), puts every method at the same
shares of all attention skipped, and writes into the output folder

  report.json, report.md  points and paired differences with 95 % intervals
  pareto.png, .html       loss against FLOPs and against measured prefill time
  layers.png              what each method skips, by layer
  token_map.png, .html    what ours does to one document

methods:
  static     drops the attention that changes its input least (LLM-Drop), the same for all texts
  random     other layers for every text
  uniform    every n-th layer
  published  one training for every skip: per-layer hinge on whole sequences, the strongest of the
             published settings; measured on prompts like all others, at a threshold that is
             searched afterwards, which the published code does not do
  ours       one training for all skips (--capacity_low)
  allocated  the same routers, each layer with its own threshold (tools/calibrate.py --allocate)
  separate   ours, with one training for every skip
  layerwise  separate, with the published hinge as its budget
  distill, noise, sharp, smooth, affine, mlp
             ours with one option more: --distill 0.5, --noise 0.5, --temperature 0.3 or 3,
             --router affine, --router mlp
"""

import argparse
import dataclasses
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megaskip.calibration.allocation import UnreachedError
from megaskip.checkpoint.routers import CONFIG
from megaskip.cli.source import with_demo
from megaskip.config import DataConfig, ModelConfig, OptimConfig, RouterConfig, RunConfig
from megaskip.errors import ConfigError, MegaskipError
from megaskip.log import quiet_libraries, set_up_logging
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import process_group, read_topology
from megaskip.study.comparison import Comparison, Measured, contrasts
from megaskip.study.pareto import (
    HEADER,
    Contrast,
    Point,
    draw,
    draw_layers,
    markdown,
    table_rows,
)

logger = logging.getLogger("compare")
BASELINES = ("static", "random", "uniform")
OURS = ["--lr", "2e-3"]
RECIPES = {
    # The published searches: rate up to 2e-4, penalty up to 0.1 (arXiv 2410.13184).
    "published": ["--budget", "layer", "--pool", "all", "--penalty_weight", "0.1", "--lr", "2e-4"],
    "separate": OURS,
    "layerwise": [*OURS, "--budget", "layer"],
    "ours": OURS,
    "allocated": OURS,
    "distill": [*OURS, "--distill", "0.5"],
    "noise": [*OURS, "--noise", "0.5"],
    "sharp": [*OURS, "--temperature", "0.3"],
    "smooth": [*OURS, "--temperature", "3"],
    "affine": [*OURS, "--router", "affine"],
    "mlp": [*OURS, "--router", "mlp"],
}
FOR_ONE_SKIP = {"published", "separate", "layerwise"}
TRAINED_AS = {"allocated": "ours"}
_ROUNDS = 2
"""Of allocation."""
METHODS = (*BASELINES, *RECIPES)
_RANK = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"}


def main(argv: Sequence[str]) -> None:
    """Train, measure, write and print."""
    options = parse(argv)
    set_up_logging(rank=0)
    logging.basicConfig(level=logging.INFO)
    quiet_libraries()
    output = Path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}; name a folder") from None
    topology = read_topology({})
    config = configuration(options)
    source = resolve_source(config.model)
    with process_group(topology, timeout=600):
        comparison = Comparison(config, topology, source)
        for skip in options.skip:
            comparison.share(skip)
        if options.blimp:
            comparison.add_pairs(Path(options.blimp), options.pairs)
        trainings = {
            (method, skip): trained(comparison, method, skip, options)
            for method in options.methods
            for skip in options.skip
        }
        measure_all(comparison, trainings, options)


def configuration(options: argparse.Namespace) -> RunConfig:
    """Return what the comparison loads and reads."""
    data = DataConfig(
        data=tuple(options.data),
        eval_data=tuple(options.eval_data or ()),
        held_out=options.documents,
        seq_length=options.seq_length,
        cache_dir=options.cache_dir,
    )
    return RunConfig(
        model=ModelConfig(model=options.model, dtype="float32"),
        router=RouterConfig(layers=options.layers),
        data=with_demo(data),
        optim=OptimConfig(calibration_rows=options.calibration_rows),
    )


def measure_all(
    comparison: Comparison,
    trainings: dict[tuple[str, float], list[Path]],
    options: argparse.Namespace,
) -> None:
    """Measure every method at every skip, then write the report."""
    dense = comparison.measure(comparison.everything)
    orders = comparison.orders(options.seeds)
    points = [comparison.point("dense", 0.0, [dense], dense)]
    found: dict[tuple[str, float], list[Measured]] = {}
    left_out: list[str] = []
    shown = options.skip[len(options.skip) // 2]
    for (method, skip), runs in tqdm(trainings.items(), desc="measuring", disable=None):
        measured = [
            comparison.measure(comparison.policy(order, skip)) for order in orders.get(method, ())
        ]
        for run in runs:
            rounds = _ROUNDS if method == "allocated" else 0
            try:
                kept = comparison.take(run / "routers", skip, rounds=rounds)
            except UnreachedError as error:
                left_out.append(f"{method} at {100 * skip:g} %, {run.name}: {error}")
                logger.warning("left out: %s", left_out[-1])
                continue
            logger.info("%s: capacity %.4f for %.4f", run.name, kept, 1 - comparison.share(skip))
            measured.append(comparison.measure(None))
            if method == options.ours and skip == shown and run == runs[0]:
                title = f"{method}, {skip:.1%} of all attention skipped"
                draw_tokens(comparison, title, Path(options.output))
        if measured:
            seconds = statistics.mean(map(train_seconds, runs)) if runs else None
            points.append(comparison.point(method, skip, measured, dense, train_seconds=seconds))
            found[method, skip] = measured
            logger.info("%s", "  ".join(table_rows(points[-1:])[0]))
            # Again after every point: a comparison takes hours.
            write(points, contrasts(found, options.ours), options, left_out)
    show(points, contrasts(found, options.ours), options)
    for one in left_out:
        print(f"left out: {one}")


def draw_tokens(comparison: Comparison, title: str, output: Path) -> None:
    """Draw what the routers do to one document."""
    picture = comparison.picture(title)
    picture.write_png(output / "token_map.png")
    picture.write_html(output / "token_map.html")


# -- training


def trained(
    comparison: Comparison, method: str, skip: float, options: argparse.Namespace
) -> list[Path]:
    """Return a method's runs for a skip, one a seed; those that are missing are trained."""
    if method not in RECIPES:
        return []
    capacity, runs = 1 - comparison.share(skip), []
    for seed in options.seeds:
        if method in FOR_ONE_SKIP:
            name, flags = f"{method}-{capacity:.4f}-s{seed}", ["--capacity", f"{capacity:.6f}"]
        else:
            low = 1 - comparison.share(max(options.skip))
            middle = 1 - comparison.share(statistics.mean(options.skip))
            name = f"{TRAINED_AS.get(method, method)}-s{seed}"
            flags = ["--capacity", f"{middle:.6f}", "--capacity_low", f"{low:.6f}"]
        run = Path(options.output) / "runs" / name
        if not ((run / "routers" / CONFIG).is_file() and (run / "report.json").is_file()):
            if options.no_training:
                continue
            train(options, run, [*RECIPES[method], *flags, "--seed", str(seed)])
        runs.append(run)
    return runs


def train(options: argparse.Namespace, run: Path, flags: Sequence[str]) -> None:
    """Train one set of routers with launch/train.py."""
    command = [sys.executable, "-m", "megaskip", "train", "--model", options.model]
    for entry in options.data:
        command += ["--data", entry]
    command += ["--seq_length", str(options.seq_length), "--layers", options.layers]
    command += ["--max_steps", str(options.steps), "--micro_batch_size", "16", "--no-progress"]
    # What is measured here is carved off the same text, and must not be trained on.
    held_out = 16 if options.eval_data else options.documents
    command += ["--calibration_rows", str(options.calibration_rows), "--held_out", str(held_out)]
    command += ["--dtype", "float32", "--save_every", "0", "--output_dir", str(run), *flags]
    command += ["--resume", "auto"]  # one that was interrupted while it calibrated
    command += ["--cache_dir", options.cache_dir] if options.cache_dir else []
    logger.info("%s", " ".join(command))
    # A job of its own, not a rank of this one.
    alone = {name: value for name, value in os.environ.items() if name not in _RANK}
    if subprocess.run(command, env=alone).returncode:
        raise MegaskipError(f"a training failed, see above; its command: {shlex.join(command)}")


def train_seconds(run: Path) -> float:
    """Return how long a training took, loading and calibration left out."""
    return float(json.loads((run / "report.json").read_text(encoding="utf-8"))["seconds"])


# -- report


def write(
    points: Sequence[Point],
    against: Sequence[Contrast],
    options: argparse.Namespace,
    left_out: Sequence[str],
) -> None:
    """Write the report of what is measured so far; `left_out` are runs that miss a skip."""
    output = Path(options.output)
    report = {
        "options": vars(options),
        "points": [dataclasses.asdict(point) for point in points],
        "contrasts": [dataclasses.asdict(one) for one in against],
        "left_out": list(left_out),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = "".join(f"- {one}\n" for one in [*against, *(f"left out: {o}" for o in left_out)])
    (output / "report.md").write_text(markdown(points) + "\n" + lines)


def show(points: Sequence[Point], against: Sequence[Contrast], options: argparse.Namespace) -> None:
    """Draw the figures and print the table."""
    output = Path(options.output)
    name = Path(options.model).name
    draw(points, output / "pareto.png", title=f"{name}: loss against cost")
    draw_layers(points, output / "layers.png", title=f"{name}: what is skipped")
    print("  ".join(HEADER))
    for row in table_rows(points):
        print("  ".join(row))
    print("".join(f"- {one}\n" for one in against))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="base model, folder, hub id or demo")
    add("--data", action="append", required=True, help="text to train on")
    add("--eval_data", action="append", help="text to measure on [carved off]")
    rows = "rows of it to measure on, from all over it; a long text is several [512]"
    add("--documents", type=int, default=512, help=rows)
    add("--blimp", help="folder of minimal pairs: JSONL, sentence_good and _bad")
    add("--pairs", type=int, default=200, help="pairs of each of its sets [200]")
    skip = "12.5,25,37.5"
    add("--skip", type=_shares, default=skip, help=f"percent of all attention [{skip}]")
    add("--seeds", type=_numbers, default="0,1,2", help="[0,1,2]")
    methods = "static,random,uniform,published,ours"
    add("--methods", type=lambda t: t.split(","), default=methods, help=f"[{methods}]")
    add("--ours", choices=RECIPES, help="which one the others are set against [ours]")
    add("--layers", default="half", help="as --layers of launch/train.py [half]")
    add("--steps", type=int, default=300, help="of each training, 16 rows each [300]")
    add("--seq_length", type=int, default=256, help="[256]")
    add("--calibration_rows", type=int, default=512, help="[512]")
    add("--cache_dir", help="as --cache_dir of launch/train.py")
    add("--no_training", action="store_true", help="take only runs that exist")
    add("--output", required=True, help="folder to write")
    options = parser.parse_args(argv)
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]!r} is not one of {', '.join(METHODS)}")
    if options.ours not in (None, *options.methods):
        raise ConfigError(f"--ours {options.ours} is not among --methods; add it there")
    for name in ("documents", "pairs", "steps", "calibration_rows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1")
    options.ours = options.ours or "ours"
    return options


def _shares(text: str) -> list[float]:
    return sorted(float(part) / 100 for part in text.split(","))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
