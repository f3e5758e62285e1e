"""What each option of the training signal adds to the time of a step, in one run.

    python tools/bench/signals.py --model demo --threads 1 --cpu_time
    python tools/bench/signals.py --model path/to/Meta-Llama-3-8B --dtype bfloat16 --tokens 2048

The options take turns on one model and one random batch, each with its own routers and the engine
that launch/train.py trains with, so that their ratios hold on a noisy machine.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone

from megaskip.arch import attach_routers, detach_routers
from megaskip.bench.timing import Stopwatch
from megaskip.cli.run import run_cli
from megaskip.config import ModelConfig, OptimConfig, RouterConfig, RunConfig
from megaskip.data import Batch
from megaskip.parallel.build import build_engine
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import process_group, read_topology
from megaskip.reporting.summary import versions

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "--budget layer": ({"budget": "layer"}, {}),
    "--capacity_low 0.3": ({"capacity_low": 0.3}, {}),
    "--distill 0.5": ({}, {"distill": 0.5}),
    "--noise 0.5": ({}, {"noise": 0.5}),
    "--temperature 3": ({}, {"temperature": 3.0}),
    "--router affine": ({"router": "affine"}, {}),
    "--router mlp": ({"router": "mlp"}, {}),
}
"""The settings of RouterConfig and OptimConfig behind each."""


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    options = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    config = RunConfig(model=ModelConfig(model=options.model, dtype=options.dtype))
    topology = read_topology({})
    with process_group(topology, timeout=600):
        plain = build_engine(config, topology, resolve_source(config.model), None)
        batch = random_batch(plain.module.model.config.vocab_size, options)
        seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
        for _ in tqdm(range(options.repeats), desc="turns", disable=None):
            for name in OPTIONS:
                engine = with_option(plain, name, config, topology)
                seconds[name].append(step_seconds(engine, batch, options))
    report(seconds)


def with_option(plain: Engine, name: str, config: RunConfig, topology: Any) -> Engine:
    """Return an engine for an option on the model of `plain`, whose routers it replaces."""
    router, optim = OPTIONS[name]
    model: Any = plain.module.model
    detach_routers(model)
    routers = attach_routers(model, RouterConfig(**router), register=False, verify=False)
    setting = RunConfig(model=config.model, optim=OptimConfig(**optim))
    return Engine(plain.module, routers, setting, topology)


def random_batch(vocab_size: int, options: argparse.Namespace) -> Batch:
    """Return a batch of random tokens without padding."""
    ids = torch.randint(0, vocab_size, (options.rows, options.tokens))
    real = torch.ones_like(ids, dtype=torch.bool)
    return Batch(
        input_ids=ids,
        labels=ids,
        token_mask=real,
        prompt_mask=real,
        position_ids=torch.arange(options.tokens).expand_as(ids),
    )


def step_seconds(engine: Engine, batch: Batch, options: argparse.Namespace) -> float:
    """Return the time of one step, after one that is not timed."""
    engine.train_step([batch], lr=1e-3)
    clock = time.process_time if options.cpu_time else time.perf_counter
    return Stopwatch(engine.device, clock).seconds(lambda: engine.train_step([batch], lr=1e-3))


def report(seconds: dict[str, list[float]]) -> None:
    """Print the table; a ratio is the median over turns of the ratio in a turn."""
    print("  ".join(f"{name} {number}" for name, number in versions().items()))
    print(f"{'':20} {'ms/step':>9} {'/ plain':>8} {'quartiles':>14}")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:20} {1e3 * statistics.median(found):9.1f} {middle:8.3f} {low:7.3f}-{high:.3f}"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub id or demo [demo]")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="[float32]")
    add("--rows", type=int, default=16, help="rows of the batch [16]")
    add("--tokens", type=int, default=128, help="tokens of a row [128]")
    add("--repeats", type=int, default=15, help="turns [15]")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads [all]")
    add("--cpu_time", action="store_true", help="measure CPU time, on a machine with other work")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
