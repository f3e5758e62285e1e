"""Does routing pay? Held-out quality at equal skip: dense, dropped, random, published, ours.

    python tools/compare.py --model path/to/model --data train.jsonl --eval_data heldout.jsonl \\
        --blimp path/to/blimp --skip 12.5,25,37.5,50 --seeds 0,1,2 --output comparison

Trains what is to be trained (runs that exist are taken as they are), puts every method at the same
shares of all attention skipped, and writes report.json, report.md, pareto.png and pareto.html.
"""

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

import numpy as np
from export_static import with_demo

from megaskip.arch.anatomy import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.checkpoint.routers import CONFIG, load_router_tensors, read_router_config
from megaskip.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    RunConfig,
    resolve_layers,
)
from megaskip.data import build_dataset
from megaskip.data.feed import Feed
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.evaluation.baselines import (
    Order,
    Policy,
    random_order,
    skipping,
    static_order,
    uniform_order,
    update_similarity,
)
from megaskip.evaluation.paired import Difference, ratio_difference
from megaskip.evaluation.pareto import HEADER, Point, draw, markdown, table_rows
from megaskip.evaluation.scoring import Scores, pair_accuracy, read_pairs, score, text_batches
from megaskip.inference.flow import InferenceFlow
from megaskip.job import run_cli
from megaskip.log import quiet_libraries, set_up_logging
from megaskip.parallel.build import build_engine
from megaskip.parallel.load import find_model_folder
from megaskip.parallel.topology import process_group, read_topology

logger = logging.getLogger("compare")
ROOT = Path(__file__).resolve().parent.parent
METHODS = ("static", "random", "uniform", "published", "ours")
RECIPES = {
    # The published searches: rate up to 2e-4, penalty up to 0.1 (arXiv 2410.13184).
    "published": ["--budget", "layer", "--pool", "all", "--penalty_weight", "0.1", "--lr", "2e-4"],
    "ours": ["--lr", "2e-3"],
}
TIMED = 3
_MARGIN = 0.05
"""Ours are trained for a little less capacity than they are asked for."""


class Comparison:
    """The model, its texts, and one set of routers that plays every method."""

    def __init__(self, options: argparse.Namespace, topology: Any) -> None:
        self.options = options
        folder = find_model_folder(ModelConfig(model=options.model))
        self.depth = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        self.layers = resolve_layers(options.layers, self.depth)
        self.config = RunConfig(
            model=ModelConfig(model=options.model, dtype="float32"),
            router=RouterConfig(layers=self.layers),
            data=with_demo(
                DataConfig(
                    data=tuple(options.data),
                    eval_data=tuple(options.eval_data or ()),
                    held_out=options.documents,
                    seq_length=options.seq_length,
                    cache_dir=options.cache_dir,
                )
            ),
            optim=OptimConfig(micro_batch_size=8),
        )
        self.engine = build_engine(self.config, topology, folder, None)
        self.model: Any = self.engine.module.model
        assert self.engine.routers is not None
        self.routers = self.engine.routers
        self._read(folder)

    def _read(self, folder: Path) -> None:
        options, tokenizer = self.options, load_tokenizer(folder)
        data = build_dataset(self.config.data, tokenizer)
        feed = Feed(
            data=data,
            rank=0,
            world_size=1,
            micro_batch_size=8,
            global_batch_size=8,
            seed=0,
            pad_token_id=tokenizer.pad_token_id,
            prompt_tokens=self.config.data.prompt_tokens,
        )
        self.calibration = feed.calibration(options.calibration_rows)
        held_out = [batch for batch in feed.held_out() if batch is not None]
        rows = 0
        self.held_out = []
        for batch in held_out:
            if rows < options.documents:
                self.held_out.append(batch)
                rows += len(batch.input_ids)
        self.pairs = []
        if options.blimp:
            sets = read_pairs(Path(options.blimp), options.pairs)
            texts = [text for pairs in sets.values() for pair in pairs for text in pair]
            self.pairs = text_batches(
                texts, tokenizer, prompt_tokens=self.config.data.prompt_tokens
            )

    def measure(self, policy: Policy | None) -> tuple[Scores, Scores | None, float]:
        """Return scores of the held-out text and of the pairs, and the seconds of a prefill."""
        text = score(self.model, self.routers, self.held_out, policy)
        pairs = None
        if self.pairs:
            pairs = score(self.model, self.routers, self.pairs, policy, rows_per_document=2)
        return text, pairs, self._seconds(policy)

    def _seconds(self, policy: Policy | None) -> float:
        """Return the median time of a prefill in which what is skipped is not computed."""
        flow, seconds = self.routers.flow, []
        self.routers.flow = InferenceFlow(unit="sequence")
        try:
            for _ in range(TIMED):
                begun = time.perf_counter()
                score(self.model, self.routers, self.held_out[:1], policy)
                seconds.append(time.perf_counter() - begun)
        finally:
            self.routers.flow = flow
        return statistics.median(seconds)

    def take(self, run: Path, skip: float) -> None:
        """Put a run's routers on the model, with the threshold at which `skip` is skipped."""
        config, layers, _ = read_router_config(run / "routers")
        if layers != self.layers:
            raise ConfigError(f"{run}: routes layers {layers}, the comparison {self.layers}")
        self.routers.load_state_dict(load_router_tensors(run / "routers", self.routers))
        self.routers.config = dataclasses.replace(config, capacity_low=None)
        kept = self.engine.calibrate(self.calibration, capacity=1 - self.share(skip), rounds=3)
        logger.info("%s: capacity %.4f for %.4f", run.name, kept, 1 - self.share(skip))

    def share(self, skip: float) -> float:
        """Return the share of the routed layers that makes `skip` of all layers."""
        share = skip * self.depth / len(self.layers)
        if not 0 < share < 1:
            raise ConfigError(
                f"--skip {100 * skip:g} cannot be reached by {len(self.layers)} routed layers of "
                f"{self.depth}; route more (--layers)"
            )
        return share

    def flop_ratio(self, skipped: float) -> float:
        """Return FLOPs without `skipped` of all attention over all FLOPs, at the texts' length."""
        layer = find_decoder(self.model).layers[-1]
        sites = find_sites(layer, find_decoder(self.model).model_type)
        attention = layer.get_submodule(sites.attention)
        weights = sum(p.numel() for p in attention.parameters())
        length = sum(float(b.token_mask.sum()) for b in self.held_out)
        length /= sum(len(b.input_ids) for b in self.held_out)
        # Scores and their sum over values: on average half of the length is seen.
        scores = find_decoder(self.model).hidden_size * length
        mlp = sum(p.numel() for p in layer.get_submodule(sites.mlp).parameters())
        head = find_decoder(self.model).head.weight.numel()
        attended = self.depth * (weights + scores)
        total = attended + self.depth * mlp + head
        return 1 - skipped * attended / total


def main(argv: Sequence[str]) -> None:
    """Train, measure, write and print."""
    options = parse(argv)
    set_up_logging(rank=0)
    logging.basicConfig(level=logging.INFO)
    quiet_libraries()
    skips = [float(part) / 100 for part in options.skip.split(",")]
    seeds = [int(part) for part in options.seeds.split(",")]
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    topology = read_topology({})
    with process_group(topology, timeout=600):
        comparison = Comparison(options, topology)
        dense = comparison.measure(skipping(static_order({}, ()), comparison.layers, 0.0))
        orders = baseline_orders(comparison, seeds)
        points = [point(comparison, "dense", 0.0, [dense], dense)]
        raw: dict[str, Any] = {}
        for skip in skips:
            comparison.share(skip)
            for method in options.methods:
                measured = []
                for order in orders.get(method, ()):
                    count = skip * comparison.depth
                    measured.append(comparison.measure(skipping(order, comparison.layers, count)))
                for run in trained(comparison, method, skip, skips, seeds):
                    comparison.take(run, skip)
                    measured.append(comparison.measure(None))
                if measured:
                    points.append(point(comparison, method, skip, measured, dense))
                    raw[f"{method}@{skip:g}"] = measured
                    logger.info("%s", "  ".join(table_rows(points[-1:])[0]))
    write(output, points, contrasts(raw, skips), options)


def trained(
    comparison: Comparison,
    method: str,
    skip: float,
    skips: Sequence[float],
    seeds: Sequence[int],
) -> list[Path]:
    """Return a method's runs, one a seed, and train those that are missing; ours serve any skip."""
    if method not in RECIPES:
        return []
    options, runs = comparison.options, []
    capacity = 1 - comparison.share(skip)
    for seed in seeds:
        name = f"{method}-{capacity:.4f}-s{seed}"
        flags = ["--capacity", f"{capacity:.6f}"]
        if method == "ours":
            name = f"ours-s{seed}"
            low = 1 - comparison.share(max(skips)) - _MARGIN
            middle = 1 - comparison.share(statistics.mean(skips))
            flags = ["--capacity", f"{middle:.6f}", "--capacity_low", f"{max(low, 0.02):.4f}"]
        run = Path(options.output) / "runs" / name
        if (run / "routers" / CONFIG).is_file():
            runs.append(run)
        elif not options.no_training:
            train(options, run, [*RECIPES[method], *flags, "--seed", str(seed)])
            runs.append(run)
    return runs


def train(options: argparse.Namespace, run: Path, flags: Sequence[str]) -> None:
    """Train one set of routers with launch/train.py."""
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--model", options.model]
    for entry in options.data:
        command += ["--data", entry]
    command += ["--seq_length", str(options.seq_length), "--layers", options.layers]
    command += ["--max_steps", str(options.steps), "--micro_batch_size", "16", "--no-progress"]
    command += ["--dtype", "float32", "--save_every", "0", "--output_dir", str(run), *flags]
    command += ["--cache_dir", options.cache_dir] if options.cache_dir else []
    logger.info("%s", " ".join(command))
    subprocess.run(command, check=True, cwd=ROOT)


def baseline_orders(comparison: Comparison, seeds: Sequence[int]) -> dict[str, list[Order]]:
    """Return the baselines' orders of layers, one a seed where they have seeds."""
    calibration = [batch for batch in comparison.calibration if batch is not None]
    comparison.routers.force(dict.fromkeys(comparison.layers, 1.0))
    similarity = update_similarity(comparison.model, calibration)
    comparison.routers.force({})
    logger.info("similarity %s", {k: round(v, 4) for k, v in similarity.items()})
    return {
        "static": [static_order(similarity, comparison.layers)],
        "random": [random_order(comparison.layers, seed) for seed in seeds],
        "uniform": [uniform_order(comparison.layers)],
    }


Measured = tuple[Scores, Scores | None, float]


def point(
    comparison: Comparison,
    method: str,
    asked: float,
    measured: Sequence[Measured],
    dense: Measured,
) -> Point:
    """Return a method's point: documents' scores averaged over seeds, then paired with dense."""
    nll, tokens, hits = mean(measured, "nll"), dense[0].tokens, mean_pairs(measured)
    gap = None
    dense_hits = mean_pairs([dense])
    if hits is not None and dense_hits is not None:
        gap = ratio_difference(hits, dense_hits, np.ones_like(hits))
    skipped = float(mean(measured, "skipped").mean()) * len(comparison.layers) / comparison.depth
    return Point(
        method=method,
        asked=asked,
        skipped=skipped,
        seeds=len(measured),
        loss=float(nll.sum() / tokens.sum()),
        loss_gap=ratio_difference(nll, dense[0].nll, tokens),
        pairs=None if hits is None else float(hits.mean()),
        pairs_gap=gap,
        exact=float(mean(measured, "exact").mean()),
        flops=comparison.flop_ratio(skipped),
        latency=statistics.mean(seconds for *_, seconds in measured) / dense[2],
    )


def contrasts(raw: dict[str, list[Measured]], skips: Sequence[float]) -> list[dict[str, Any]]:
    """Return ours against each other method at equal skip, paired by document."""
    rows = []
    for skip in skips:
        ours = raw.get(f"ours@{skip:g}")
        for method in METHODS[:-1]:
            theirs = raw.get(f"{method}@{skip:g}")
            if ours and theirs:
                tokens = ours[0][0].tokens
                row: dict[str, Any] = {"skip": skip, "against": method}
                row["loss"] = ratio_difference(mean(ours, "nll"), mean(theirs, "nll"), tokens)
                a, b = mean_pairs(ours), mean_pairs(theirs)
                if a is not None and b is not None:
                    row["pairs"] = ratio_difference(a, b, np.ones_like(a))
                rows.append(row)
    return rows


def mean(measured: Sequence[Measured], field: str) -> Any:
    """Return a field of the text's scores, averaged over seeds, by document."""
    return np.mean([getattr(text, field) for text, *_ in measured], axis=0)


def mean_pairs(measured: Sequence[Measured]) -> Any:
    """Return the pairs' hits averaged over seeds, None without pairs."""
    hits = [pair_accuracy(pairs) for _, pairs, _ in measured if pairs is not None]
    return np.mean(hits, axis=0) if hits else None


def write(
    output: Path,
    points: Sequence[Point],
    against: Sequence[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Write the report and print the table."""
    report = {
        "options": vars(options),
        "points": [dataclasses.asdict(one) for one in points],
        "ours_against": against,
    }
    text = json.dumps(report, indent=2, default=dataclasses.asdict)
    (output / "report.json").write_text(text + "\n")
    lines = "".join(
        f"- ours - {row['against']} at {row['skip']:.1%}: loss {_text(row['loss'], '+.4f')}"
        + (f", pairs {_text(row['pairs'], '+.2%')}\n" if "pairs" in row else "\n")
        for row in against
    )
    (output / "report.md").write_text(markdown(points) + "\n" + lines)
    draw(points, output / "pareto.png", title=f"{Path(options.model).name}: loss against cost")
    print("  ".join(HEADER))
    for row in table_rows(points):
        print("  ".join(row))
    print(lines)


def _text(gap: Difference, form: str) -> str:
    return f"{gap.value:{form}} [{gap.low:{form}}, {gap.high:{form}}]"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="base model, folder or hub id")
    parser.add_argument("--data", action="append", required=True, help="text to train on")
    parser.add_argument("--eval_data", action="append", help="text to measure on [carved off]")
    parser.add_argument("--documents", type=int, default=512, help="of it to measure on [512]")
    parser.add_argument("--blimp", help="folder of minimal pairs: JSONL, sentence_good and _bad")
    parser.add_argument("--pairs", type=int, default=200, help="pairs of each of its sets [200]")
    parser.add_argument("--skip", default="12.5,25,37.5,50", help="percent of all attention")
    parser.add_argument("--seeds", default="0,1,2", help="[0,1,2]")
    parser.add_argument("--methods", type=lambda t: t.split(","), default=list(METHODS))
    parser.add_argument("--layers", default="half", help="as --layers of launch/train.py [half]")
    parser.add_argument("--steps", type=int, default=300, help="of each training [300]")
    parser.add_argument("--seq_length", type=int, default=256, help="[256]")
    parser.add_argument("--calibration_rows", type=int, default=512, help="[512]")
    parser.add_argument("--cache_dir", help="as --cache_dir of launch/train.py")
    parser.add_argument("--no_training", action="store_true", help="take only runs that exist")
    parser.add_argument("--output", required=True, help="folder to write")
    options = parser.parse_args(argv)
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]!r} is not one of {', '.join(METHODS)}")
    return options


if __name__ == "__main__":
    run_cli(main)
