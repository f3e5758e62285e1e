"""How much of a step the stages of a pipeline wait, and what crosses a boundary.

    torchrun --standalone --nproc_per_node 2 tools/bench/pipeline.py --micro_batches 1 2 4 8

One rank per stage, on a Llama with random weights (frozen lower half, routers above). A stage's
busy time is that of its forward and backward passes; the bubble is the share of the step in which
the stages are not busy, on average. Beside it (S-1)/(M+S-1), which holds for stages of equal work.
The clock waits for the device around every pass. Give every rank a core of its own; with fewer
cores than stages the numbers mean little.

What crosses a boundary depends on widths and routed layers only: for that of a 70B,

    torchrun --standalone --nproc_per_node 2 tools/bench/pipeline.py --layers 80 --hidden 8192 \
        --heads 1 --width 64 --tokens 64 --dtype bfloat16 --granularity attn_token --micro_batches 1
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a clone

from megaskip.bench.timing import Stopwatch
from megaskip.cli.run import run_cli
from megaskip.config import parse_run_config
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.build import build_engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.pipeline import PipelineEngine
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.summary import versions


def main(argv: Sequence[str]) -> None:
    """Measure and print the table; every rank calls it."""
    options = parse(argv)
    torch.set_num_threads(1)
    stages = int(os.environ.get("WORLD_SIZE", 1))
    if stages < 2:
        raise ConfigError(
            "a pipeline has two stages or more; start it with torchrun, as --help says"
        )
    topology = read_topology(os.environ, num_stages=stages)
    flags = ["--pipeline_stages", str(stages), "--granularity", options.granularity]
    if options.partition:
        flags += ["--pipeline_partition", options.partition]
    with process_group(topology, timeout=600), tempfile.TemporaryDirectory() as scratch:
        made = on_first_rank(topology, lambda: make_model(Path(scratch), options))
        config = parse_run_config(["--model", str(made), *flags])
        engine = build_engine(config, topology, resolve_source(config.model), None)
        assert isinstance(engine, PipelineEngine)
        if topology.is_first:
            print("  ".join(f"{name} {number}" for name, number in versions().items()))
            print("stages  micro-batches  step ms  bubble  (S-1)/(M+S-1)  busy ms of each stage")
        for count in options.micro_batches:
            show(engine, topology, count, options)
        show_bytes(engine, topology)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hidden", type=int, default=512, help="hidden size [512]")
    add("--width", type=int, default=1408, help="intermediate size [1408]")
    add("--layers", type=int, default=12, help="layers [12]")
    add("--heads", type=int, help="attention heads, of 64 each [hidden size / 64]")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="[float32]")
    add("--tokens", type=int, default=256, help="tokens of a row [256]")
    add("--granularity", default="attn_sequence", help="[attn_sequence]")
    add("--partition", help="first layers of stages 1, 2, ... [balanced]")
    add("--micro_batches", type=int, nargs="+", default=[1, 2, 4, 8], help="[1 2 4 8]")
    add("--repeats", type=int, default=3, help="timed steps, the fastest counts [3]")
    return parser.parse_args(argv)


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """Write a Llama with random weights."""
    heads = options.heads or max(options.hidden // 64, 1)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=min(64, options.hidden),
    )
    dtype = getattr(torch, options.dtype)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def show(
    engine: PipelineEngine, topology: Topology, count: int, options: argparse.Namespace
) -> None:
    """Time steps of `count` micro-batches and print the fastest. Collective."""
    batches = [row(options.tokens)] * count
    best, watch = (float("inf"), [0.0]), Stopwatch(topology.device)
    for _ in range(1 + options.repeats):
        dist.barrier()
        with busy_time(engine, watch) as busy:
            begun = watch.now()
            engine.train_step(batches, 0.0)
            dist.barrier()
            wall = watch.now() - begun
        everyone = [0.0] * topology.world_size
        dist.all_gather_object(everyone, busy[0])
        best = min(best, (wall, everyone))
    if topology.is_first:
        wall, everyone = best
        bubble = 1 - sum(everyone) / len(everyone) / wall
        ideal = (topology.num_stages - 1) / (count + topology.num_stages - 1)
        each = "  ".join(f"{1e3 * one:.0f}" for one in everyone)
        cells = f"{topology.num_stages:6}  {count:13}  {1e3 * wall:7.0f}  {bubble:6.3f}"
        print(f"{cells}  {ideal:13.3f}  {each}", flush=True)


@contextlib.contextmanager
def busy_time(engine: PipelineEngine, watch: Stopwatch) -> Iterator[list[float]]:
    """Yield the seconds, added up, that this stage spends in forward and backward passes."""
    busy = [0.0]
    run_stage, backward = engine._run_stage, torch.autograd.backward

    def timed(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            begun = watch.now()
            try:
                return function(*args, **kwargs)
            finally:
                busy[0] += watch.now() - begun

        return call

    engine._run_stage = timed(run_stage)  # type: ignore[method-assign]
    torch.autograd.backward = timed(backward)
    try:
        yield busy
    finally:
        engine._run_stage, torch.autograd.backward = run_stage, backward  # type: ignore[method-assign]


def row(tokens: int) -> Batch:
    """Return one row of random tokens, all of them supervised."""
    ids = torch.randint(3, 1024, (1, tokens))
    real = torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(tokens).unsqueeze(0)
    return Batch(input_ids=ids, labels=ids, token_mask=real, prompt_mask=real, position_ids=places)


def show_bytes(engine: PipelineEngine, topology: Topology) -> None:
    """Print what each stage has sent to the next one. Collective."""
    everyone: list[list[int]] = [[]] * topology.world_size
    dist.all_gather_object(everyone, engine.bytes_sent)
    if topology.is_first:
        for stage, (states, keep) in enumerate(everyone[:-1]):
            sizes = f"{states:,} bytes of hidden states, {keep:,} of keep"
            print(f"stage {stage} to {stage + 1}: {sizes} ({keep / states:.3%}), in all steps")


if __name__ == "__main__":
    run_cli(main)
