"""Prefill, decode and memory of a dense, a routed and a statically dropped model, in one run.

    python tools/bench/inference.py
    python tools/bench/inference.py --granularity attn_sequence attn_token --kv keep drop
    python tools/bench/inference.py --model path/to/Meta-Llama-3-70B --layers_used 8 \
        --batch 1 16 --prompt 512 4096

Random weights of the given shape are enough: speed does not depend on them, and decisions are
forced. Of the routed layers' units (sequences or tokens) exactly the share --capacity is kept,
spread so that rows keep different layers and layers keep different rows; where batch x layers
does not divide, the nearest share, which the table shows. Capacity 1 is the cost of routing; 0 is
the routed layers skipped by every row. "dropped" has the same share of the layers' sublayers taken
out for good, for every row, evenly spaced: what can be had without any routing. "routed+map" and
"dropped+map" put a low-rank map of --compensation_rank where something is skipped.

`megaskip bench` measures fixed shapes and writes a report; this tool takes any model and setting.
All variants have the same weights and tokens. Each timed run stands beside a dense one, before or
after it by turns, and variants come in another order every turn: "x dense" is the median of the
ratios of such pairs, "+-" its standard error, estimated from their quartiles. "ideal" is what the
ratio would be if only arithmetic (prefill) or memory traffic (decode) took time:

  prefill  FLOPs of the very call, counted by torch; causal attention is taken as a full square
  decode   bytes that a step moves: weights, but not those of a sublayer that every row skips, and
           the keys and values in the cache, which one that grows reads and writes once more to make
           room; experts of a mixture are all taken as read

On one thread --cpu_time counts what the CPU spends on this process: the same on an idle machine,
and blind to the turns that others take on a shared one.

KV MiB is what the cache's storages take after the last step. Peak MiB is beyond the weights, cache
included, over prefill and decode: the allocator's on a GPU, of live tensors on a CPU.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone

from megaskip.arch import find_decoder
from megaskip.arch.trainable import describe_layers
from megaskip.bench.counts import account, ideals, peak, size
from megaskip.bench.serving import speeds, timed
from megaskip.bench.shapes import SHAPES, build, config_of
from megaskip.bench.timing import Limits, Pairs, Sample, Stopwatch, of_base, timed_pairs
from megaskip.bench.variants import DENSE, Bench, Variant, variants, wired
from megaskip.cli.run import run_cli
from megaskip.config import resolve_layers
from megaskip.config.routing import KV_CHOICES, SUBLAYER_GRANULARITIES
from megaskip.reporting.summary import versions

COLUMNS = {
    "batch": ("batch", "d"),
    "prompt": ("prompt", "d"),
    "variant": ("variant                    ", "27"),
    "capacity": (" kept", ".3f"),
    "prefill_ms": ("prefill ms", ".1f"),
    "prefill_speedup": ("x dense", ".3f"),
    "prefill_error": ("  +-", ".3f"),
    "prefill_ideal": ("ideal", ".3f"),
    "decode_tokens_per_second": ("decode tok/s", ".1f"),
    "decode_speedup": ("x dense", ".3f"),
    "decode_error": ("  +-", ".3f"),
    "decode_ideal": ("ideal", ".3f"),
    "kv_mib": ("KV MiB", ".2f"),
    "kv_share": ("/ dense", ".4f"),
    "peak_mib": ("peak MiB", ".1f"),
}


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    options = parse(argv)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = build(config(options), options.device, getattr(torch, options.dtype))
    layers = resolve_layers(options.layers, len(find_decoder(model).layers))
    about = describe(model, layers, options)
    for name, value in about.items():
        print(f"{name:9} {value}")
    print("  ".join(title for title, _ in COLUMNS.values()))
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rows = []
    with torch.no_grad():
        for batch, prompt in itertools.product(options.batch, options.prompt):
            shape = (batch, prompt + options.decode_steps)
            ids = torch.randint(vocabulary, shape, device=options.device)
            first, later = ids.tensor_split([prompt], dim=1)
            bench = Bench(model=model, layers=layers, prompt=first, answer=later)
            measured = measure(bench, options)
            print("\n".join(map(line, measured)), flush=True)
            rows += measured
            if options.output:
                content = {"about": about, "options": vars(options), "rows": rows}
                text = json.dumps(content, indent=2) + "\n"
                Path(options.output).write_text(text, encoding="utf-8")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, cuda = parser.add_argument, torch.cuda.is_available()
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder with a config.json; its weights are not read")
    model.add_argument("--shape", default="demo-110m", choices=SHAPES, help="a shape [demo-110m]")
    add("--layers_used", type=int, help="cut the model to so many layers, for large shapes [all]")
    add("--layers", default="half", help="routed layers: half, a count, or a list such as 8-14,16")
    what = "what is skipped, one or more [attn_sequence]"
    add(
        "--granularity",
        nargs="+",
        default=["attn_sequence"],
        choices=SUBLAYER_GRANULARITIES,
        help=what,
    )
    seen = "token units: are skipped tokens seen, one or both [keep]"
    add("--kv", nargs="+", default=["keep"], choices=KV_CHOICES, help=seen)
    add("--batch", type=int, nargs="+", default=[1, 4], help="rows of a batch [1 4]")
    add("--prompt", type=int, nargs="+", default=[128, 512], help="tokens of a prompt [128 512]")
    capacities = "shares that the routed layers keep [1 0.5 0]"
    add("--capacity", type=float, nargs="+", default=[1.0, 0.5, 0.0], help=capacities)
    rank = "rank of the maps that skipped units get in the rows +map, 0 for no such rows [64]"
    add("--compensation_rank", type=int, default=64, help=rank)
    add("--decode_steps", type=int, default=16, help="new tokens of a row [16]")
    add("--repeats", type=int, default=9, help="timed turns [9]")
    add("--warmup", type=int, default=1, help="turns before them that are not timed [1]")
    add("--device", default="cuda" if cuda else "cpu", help="[cuda if there is one, else cpu]")
    dtype = "bfloat16" if cuda else "float32"
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", default=dtype, choices=dtypes, help="[bfloat16 if there is a GPU, else float32]")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads [all]")
    add("--cpu_time", action="store_true", help="count what the CPU spends here, not what passes")
    add("--output", metavar="FILE.json", help="write the rows there, too")
    options = parser.parse_args(argv)
    smallest = min(options.decode_steps, options.repeats, *options.batch, *options.prompt)
    if smallest < 1 or options.compensation_rank < 0:
        parser.error("--batch, --prompt, --decode_steps and --repeats must be at least 1")
    if not all(0 <= capacity <= 1 for capacity in options.capacity):
        parser.error("--capacity must lie in [0, 1]")
    if options.cpu_time and (options.threads > 1 or options.device != "cpu"):
        parser.error("--cpu_time needs --device cpu --threads 1: elsewhere it is not what passes")
    return options


def config(options: argparse.Namespace) -> Any:
    """Return the transformers config that is asked for."""
    asked = options.model
    hf_config = AutoConfig.from_pretrained(asked) if asked else config_of(SHAPES[options.shape])
    if options.layers_used:
        cut(hf_config.get_text_config(decoder=True), options.layers_used)
    return hf_config


def cut(config: Any, count: int) -> None:
    """Let a config have its first `count` layers only."""
    if not 1 <= count <= config.num_hidden_layers:
        raise SystemExit(f"--layers_used {count}: the model has {config.num_hidden_layers} layers")
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    config.num_hidden_layers = count


def describe(model: Any, layers: Sequence[int], options: argparse.Namespace) -> dict[str, str]:
    """Return the lines above the table."""
    cuda = torch.device(options.device).type == "cuda"
    cut_to = f" (cut to {options.layers_used} layers)" if options.layers_used else ""
    depth = len(find_decoder(model).layers)
    return {
        "versions": "  ".join(f"{name} {number}" for name, number in versions().items()),
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {options.threads} threads",
        "model": f"{options.model or options.shape}{cut_to}, random weights, {depth} layers, "
        f"{options.dtype}, {size(model) / 2**20:,.0f} MiB",
        "routed": f"layers {describe_layers(layers)}",
        "timing": f"medians of {options.repeats} pairs; {options.decode_steps} new tokens"
        + ("; CPU time" if options.cpu_time else ""),
    }


# -- measures


def measure(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of the table for one batch and prompt, dense first."""
    asked = (options.granularity, options.kv, options.capacity, options.compensation_rank)
    compared = [DENSE, *variants(bench, *asked)]
    counted = []
    for variant in compared:
        with wired(bench, variant) as override:
            counted.append({**account(bench, variant, override), **peak(bench, variant, override)})
    pairs = paired_runs(bench, compared, options)
    return [
        {"batch": len(bench.prompt), "prompt": bench.prompt.shape[1], "variant": variant.title}
        | {"capacity_asked": variant.asked, "capacity": variant.kept}
        | speeds(pairs[index], bench.answer.shape[1], len(bench.prompt))
        | counted[index]
        | ideals(counted[index], counted[0])
        for index, variant in enumerate(compared)
    ]


def paired_runs(
    bench: Bench, compared: Sequence[Variant], options: argparse.Namespace
) -> Pairs[int]:
    """Return, for each variant by its index, the times of dense and of itself in every turn."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    watch = Stopwatch(bench.prompt.device, clock)

    def run(index: int) -> Sample:
        with wired(bench, compared[index]) as override:
            return timed(bench, compared[index], override, watch)

    limits = Limits(turns=options.repeats, warmup=options.warmup)
    turns = timed_pairs(run, range(1, len(compared)), 0, limits)
    *_, pairs = tqdm(turns, desc="turns", total=options.repeats, disable=None, leave=False)
    return {0: of_base(pairs), **pairs}


# -- report


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [
        (title, "-" if row[name] is None else format(row[name], kind))
        for name, (title, kind) in COLUMNS.items()
    ]
    return "  ".join(cell.rjust(len(title)) for title, cell in cells)


if __name__ == "__main__":
    run_cli(main)
