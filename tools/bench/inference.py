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

All variants have the same weights and tokens. Each timed run stands beside a dense one, before or
after it by turns, and variants come in another order every turn: "x dense" is the median of the
ratios of such pairs, "+-" its standard error, estimated from their quartiles. "ideal" is what the
ratio would be if only arithmetic (prefill) or memory traffic (decode) took time:

  prefill  FLOPs of the very call, counted by torch; causal attention is taken as a full square
  decode   bytes that a step reads: weights, but not those of a sublayer that every row skips,
           and the keys and values in the cache; experts of a mixture are all taken as read

On one thread --cpu_time counts what the CPU spends on this process: the same on an idle machine,
and blind to the turns that others take on a shared one.

KV MiB is what the cache's storages take after the last step. Peak MiB is beyond the weights, cache
included, over prefill and decode: the allocator's on a GPU, of live tensors on a CPU.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone

from inference_cost import account, ideals, peak, size
from inference_variants import DENSE, Bench, Override, Variant, decode, prefill, variants, wired

from megaskip.arch import find_decoder
from megaskip.arch.trainable import describe_layers
from megaskip.cli.run import run_cli
from megaskip.config import resolve_layers
from megaskip.config.routing import GRANULARITIES, KV_CHOICES
from megaskip.reporting.summary import versions

FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)
SHAPES = {
    "demo-110m": (8192, 768, 2048, 14, 12, 4),
    "llama3-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama3-70b": (128256, 8192, 28672, 80, 64, 8),
}
Times = tuple[float, float]
"""Seconds of the prefill and of all decode steps."""

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
    model = build(options)
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
            found = measure(bench, options)
            print("\n".join(map(line, found)), flush=True)
            rows += found
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
    add("--granularity", nargs="+", default=["attn_sequence"], choices=GRANULARITIES, help=what)
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


def build(options: argparse.Namespace) -> Any:
    """Return a model with random weights, made on the device."""
    if options.model:
        config = AutoConfig.from_pretrained(options.model)
    else:
        config = LlamaConfig(**dict(zip(FIELDS, SHAPES[options.shape], strict=True)))
    if options.layers_used:
        cut(config.get_text_config(decoder=True), options.layers_used)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


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
    compared = list(variants(bench, *asked))
    counted = []
    for variant in (DENSE, *compared):
        with wired(bench, variant) as override:
            counted.append({**account(bench, variant, override), **peak(bench, variant, override)})
    pairs = timed_pairs(bench, compared, options)
    everything = [dense for one in pairs for dense, _ in one]
    timed = [[(dense, dense) for dense in everything], *pairs]
    return [
        {"batch": len(bench.prompt), "prompt": bench.prompt.shape[1], "variant": variant.title}
        | {"capacity_asked": variant.asked, "capacity": variant.kept}
        | speeds(timed[index], bench.answer.numel())
        | counted[index]
        | ideals(counted[index], counted[0])
        for index, variant in enumerate((DENSE, *compared))
    ]


def timed_pairs(
    bench: Bench, compared: Sequence[Variant], options: argparse.Namespace
) -> list[list[tuple[Times, Times]]]:
    """Return, for each variant, the times of dense and of itself in every turn."""
    pairs: list[list[tuple[Times, Times]]] = [[] for _ in compared]
    turns = options.warmup + options.repeats
    clock = time.process_time if options.cpu_time else time.perf_counter
    places, shuffle = list(range(len(compared))), random.Random(0).shuffle
    for turn in tqdm(range(turns), desc="turns", disable=None, leave=False):
        shuffle(places)
        for place in places:
            order = (DENSE, compared[place])[:: 1 if turn % 2 else -1]
            times = {}
            for variant in order:
                with wired(bench, variant) as override:
                    times[variant.name] = timed(bench, variant, override, clock)
            if turn >= options.warmup:
                pairs[place].append((times[DENSE.name], times[compared[place].name]))
    return pairs


def timed(bench: Bench, variant: Variant, override: Override, clock: Callable[[], float]) -> Times:
    """Return the seconds of prefill and of all decode steps."""
    begun = now(bench, clock)
    cache = prefill(bench, variant, override)
    filled = now(bench, clock)
    for _ in decode(bench, variant, override, cache):
        pass
    return filled - begun, now(bench, clock) - filled


def now(bench: Bench, clock: Callable[[], float]) -> float:
    """Return the time when the device has done what it was given."""
    if bench.prompt.is_cuda:
        torch.cuda.synchronize(bench.prompt.device)
    return clock()


# -- report


def speeds(pairs: Sequence[tuple[Times, Times]], tokens: int) -> dict[str, float]:
    """Return medians over pairs, of times and of their ratios to dense."""
    found = {}
    for index, phase in enumerate(("prefill", "decode")):
        ratios = [dense[index] / own[index] for dense, own in pairs]
        found[f"{phase}_speedup"] = statistics.median(ratios)
        found[f"{phase}_error"] = error(ratios)
    found["prefill_ms"] = 1e3 * statistics.median(own[0] for _, own in pairs)
    found["decode_tokens_per_second"] = tokens / statistics.median(own[1] for _, own in pairs)
    return found


def error(values: Sequence[float]) -> float:
    """Return the standard error of a median, as for normal values of this interquartile range."""
    if len(values) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(values, n=4)
    return 1.2533 * (high - low) / 1.349 / float(len(values)) ** 0.5


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [(title, format(row[name], kind)) for name, (title, kind) in COLUMNS.items()]
    return "  ".join(cell.rjust(len(title)) for title, cell in cells)


if __name__ == "__main__":
    run_cli(main)
