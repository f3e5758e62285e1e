"""Prefill, decode and memory of a dense, a routed and a statically dropped model, in one run.

    python tools/benchmark_inference.py
    python tools/benchmark_inference.py --model path/to/Meta-Llama-3-70B --layers_used 8 \
        --batch 1 16 --prompt 512 4096

Random weights of the given shape are enough: speed does not depend on them, and decisions are
forced. Of the routed layers' units (sequences or tokens) exactly the share --capacity is kept,
spread so that rows keep different layers and layers keep different rows; where batch x layers
does not divide, the nearest share, which the table shows. "static drop" leaves the same share of
the same layers out for every row, evenly spaced, through the same code.

All variants have the same weights and take turns on the same tokens, so that ratios hold on a
noisy machine: "x dense" is the median over turns of the ratio to dense in that turn. "ideal" is
what the ratio would be if only arithmetic (prefill) or memory traffic (decode) took time:

  prefill  FLOPs of the very call, counted by torch; causal attention is taken as a full square
  decode   bytes that a step reads: weights, but not those of a sublayer that every row skips,
           and the keys and values in the cache; experts of a mixture are all taken as read

KV MiB is what the cache's storages take after the last step. Peak MiB is beyond the weights, cache
included, over prefill and decode: the allocator's on a GPU, of live tensors on a CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from megaskip.arch import attach_routers, detach_routers, find_decoder
from megaskip.arch.anatomy import describe_layers
from megaskip.arch.sites import find_sites
from megaskip.config import RouterConfig, resolve_layers
from megaskip.config.router import GRANULARITIES
from megaskip.inference.flow import KV_CHOICES, InferenceFlow
from megaskip.parallel.live_bytes import LiveBytes
from megaskip.reporting.summary import versions

FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
SHAPES = {
    "demo-110m": (8192, 768, 2048, 14, 12, 4),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama3-70b": (128256, 8192, 28672, 80, 64, 8),
}
COLUMNS = {
    "batch": ("batch", "d"),
    "prompt": ("prompt", "d"),
    "variant": ("variant    ", "11"),
    "capacity": (" kept", ".3f"),
    "prefill_ms": ("prefill ms", ".1f"),
    "prefill_speedup": ("x dense", ".2f"),
    "prefill_ideal": ("ideal", ".2f"),
    "decode_tokens_per_second": ("decode tok/s", ".1f"),
    "decode_speedup": ("x dense", ".2f"),
    "decode_ideal": ("ideal", ".2f"),
    "kv_mib": ("   KV MiB", ".2f"),
    "kv_share": ("/ dense", ".4f"),
    "peak_mib": (" peak MiB", ".1f"),
}

Keep = dict[int, Tensor]
"""Forced decisions by layer, float32 [B, U], 1 = run."""
Force = Callable[[Keep], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the model, with its decisions."""

    name: str
    granularity: str = ""
    asked: float = 1.0
    prompt: Keep = dataclasses.field(default_factory=dict)
    steps: tuple[Keep, ...] = ()
    """Decisions about each new token; empty where those of the prompt hold on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all variants share: the model, its routed layers and a batch."""

    model: Any
    layers: tuple[int, ...]
    prompt: Tensor
    """int64 [B, T]."""
    answer: Tensor
    """int64 [B, n], the tokens of the decode steps."""
    kv: str


def main() -> None:
    """Measure and print the table."""
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = build(options)
    layers = resolve_layers(options.layers, len(find_decoder(model).layers))
    about = describe(model, layers, options)
    for name, value in about.items():
        print(f"{name:9} {value}")
    print("  ".join(title for title, _ in COLUMNS.values()))
    cells = 1 + 2 * len(options.capacity)
    turns = (1 + options.warmup + options.repeats) * len(options.batch) * len(options.prompt)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rows = []
    with torch.no_grad(), tqdm(total=cells * turns, desc="runs", disable=None) as bar:
        for batch, prompt in itertools.product(options.batch, options.prompt):
            shape = (batch, prompt + options.decode_steps)
            ids = torch.randint(vocabulary, shape, device=options.device)
            first, later = ids.tensor_split([prompt], dim=1)
            bench = Bench(model=model, layers=layers, prompt=first, answer=later, kv=options.kv)
            rows += measure(bench, options, bar)
            tqdm.write("\n".join(map(line, rows[-cells:])))
            sys.stdout.flush()
            if options.output:
                content = {"about": about, "options": vars(options), "rows": rows}
                text = json.dumps(content, indent=2) + "\n"
                Path(options.output).write_text(text, encoding="utf-8")


def parse() -> argparse.Namespace:
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
    add("--granularity", default="attn_sequence", choices=GRANULARITIES, help="what is skipped")
    add("--kv", default="keep", choices=KV_CHOICES, help="token units: are skipped tokens seen?")
    add("--batch", type=int, nargs="+", default=[1, 4], help="rows of a batch [1 4]")
    add("--prompt", type=int, nargs="+", default=[128, 512], help="tokens of a prompt [128 512]")
    capacities = "shares that the routed layers keep [0.75 0.5 0.25]; 1 is the cost of routing"
    add("--capacity", type=float, nargs="+", default=[0.75, 0.5, 0.25], help=capacities)
    add("--decode_steps", type=int, default=16, help="new tokens of a row [16]")
    add("--repeats", type=int, default=5, help="timed turns [5]")
    add("--warmup", type=int, default=1, help="turns before them that are not timed [1]")
    add("--device", default="cuda" if cuda else "cpu", help="[cuda if there is one, else cpu]")
    dtype = "bfloat16" if cuda else "float32"
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", default=dtype, choices=dtypes, help="[bfloat16 if there is a GPU, else float32]")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads [all]")
    add("--output", metavar="FILE.json", help="write the rows there, too")
    options = parser.parse_args()
    if min(options.decode_steps, options.repeats, *options.batch, *options.prompt) < 1:
        parser.error("--batch, --prompt, --decode_steps and --repeats must be at least 1")
    if not all(0 <= capacity <= 1 for capacity in options.capacity):
        parser.error("--capacity must lie in [0, 1]")
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
        "routed": f"{options.granularity}, kv {options.kv}, layers {describe_layers(layers)}",
        "timing": f"medians of {options.repeats} turns; decode of {options.decode_steps} tokens",
    }


# -- what is kept


def variants(bench: Bench, options: argparse.Namespace) -> Iterator[Variant]:
    """Yield what is compared, dense first."""
    yield Variant(name="dense")
    target, unit = options.granularity.split("_")
    batch = len(bench.prompt)
    for asked in options.capacity:
        routed = functools.partial(
            Variant, name="routed", granularity=options.granularity, asked=asked
        )
        if unit == "token":
            turns = range(options.decode_steps)
            steps = tuple(spread(bench, batch, asked, turn=turn) for turn in turns)
            yield routed(prompt=spread_tokens(bench, asked), steps=steps)
        else:
            yield routed(prompt=spread(bench, batch, asked))
        alike = {layer: one.expand(batch, 1) for layer, one in spread(bench, 1, asked).items()}
        yield Variant(
            name="static drop", granularity=f"{target}_sequence", asked=asked, prompt=alike
        )


def spread(bench: Bench, batch: int, capacity: float, *, turn: int = 0) -> Keep:
    """Return [B, 1] by layer: the share of all cells, dealt out to layers and rows in turn."""
    depth = len(bench.layers)
    total = int(capacity * batch * depth + 0.5)
    keep = {}
    for index, layer in enumerate(bench.layers):
        place = (index + turn) % depth
        rows = torch.arange(total * place // depth, total * (place + 1) // depth) + turn
        cells = torch.zeros(batch, 1).index_fill_(0, rows % batch, 1.0)
        keep[layer] = cells.to(bench.prompt.device)
    return keep


def spread_tokens(bench: Bench, capacity: float) -> Keep:
    """Return [B, T] by layer: the share of every row's tokens, others in every row and layer."""
    batch, tokens = bench.prompt.shape
    total = int(capacity * tokens + 0.5)
    device = bench.prompt.device
    place = torch.arange(batch, device=device)[:, None] + torch.arange(tokens, device=device)
    return {
        layer: ((place + index) * total % tokens < total).float()
        for index, layer in enumerate(bench.layers)
    }


# -- one call


@contextlib.contextmanager
def wired(bench: Bench, variant: Variant) -> Iterator[Force]:
    """Give the model the routers of a variant, if it has any; yields what forces decisions."""
    if not variant.prompt:
        yield lambda keep: None
        return
    config = RouterConfig(granularity=variant.granularity, layers=bench.layers)
    routers = attach_routers(bench.model, config, verify=False)
    routers.flow = InferenceFlow(unit=config.unit, kv=bench.kv)
    try:
        yield routers.force
    finally:
        detach_routers(bench.model)


def prefill(bench: Bench, variant: Variant, force: Force) -> Any:
    """Run the prompt and return its cache; the last token alone has logits, as in generate()."""
    force(variant.prompt)
    return bench.model(input_ids=bench.prompt, use_cache=True, logits_to_keep=1).past_key_values


def decode(bench: Bench, variant: Variant, force: Force, cache: Any) -> Iterator[int]:
    """Run the tokens of the answer one after the other; yields the number of each after it."""
    for step, ids in enumerate(bench.answer.split(1, dim=1)):
        if variant.steps:
            force(variant.steps[step])
        bench.model(input_ids=ids, past_key_values=cache, use_cache=True)
        yield step


def now(bench: Bench) -> float:
    """Return the time when the device has done what it was given."""
    if bench.prompt.is_cuda:
        torch.cuda.synchronize(bench.prompt.device)
    return time.perf_counter()


# -- measures


def measure(bench: Bench, options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """Return the rows of the table for one batch and prompt."""
    compared = list(variants(bench, options))
    counted = []
    times: list[list[tuple[float, float]]] = []
    for variant in compared:
        with wired(bench, variant) as force:
            counted.append({**account(bench, variant, force), **peak(bench, variant, force)})
        bar.update()
    for _ in range(options.warmup + options.repeats):
        times.append([])
        for variant in compared:
            with wired(bench, variant) as force:
                times[-1].append(timed(bench, variant, force))
            bar.update()
    batch, prompt = bench.prompt.shape
    rows = []
    for index, variant in enumerate(compared):
        kept = [float(keep.mean()) for keep in variant.prompt.values()] or [1.0]
        rows.append(
            {"batch": batch, "prompt": prompt, "variant": variant.name}
            | {"capacity_asked": variant.asked, "capacity": statistics.mean(kept)}
            | speeds(times[options.warmup :], index, bench.answer.numel())
            | counted[index]
            | ideals(counted[index], counted[0])
        )
    return rows


def timed(bench: Bench, variant: Variant, force: Force) -> tuple[float, float]:
    """Return the seconds of prefill and of all decode steps."""
    begun = now(bench)
    cache = prefill(bench, variant, force)
    filled = now(bench)
    for _ in decode(bench, variant, force, cache):
        pass
    return filled - begun, now(bench) - filled


def account(bench: Bench, variant: Variant, force: Force) -> dict[str, float]:
    """Return what a variant computes, reads and holds."""
    with FlopCounterMode(display=False, custom_mapping=attention_formulas()) as counter:
        cache = prefill(bench, variant, force)
    steps = decode(bench, variant, force, cache)
    read = statistics.mean(bytes_read(bench, variant, cache, step) for step in steps)
    return {
        "prefill_gflop": counter.get_total_flops() / 1e9,
        "decode_read_mib": read / 2**20,
        "kv_mib": sum(map(kv_bytes, cache.layers)) / 2**20,
    }


def attention_formulas() -> dict[Any, Any]:
    """Return FLOPs of fused attention: torch counts none on a CPU, and asks for equal heads."""

    def flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return int(2 * batch * heads * queries * key[2] * (width + value[3]))

    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    operators = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}") for name in names]
    return dict.fromkeys(operators, flops)


def peak(bench: Bench, variant: Variant, force: Force) -> dict[str, float]:
    """Return the peak of prefill and decode, beyond what lives already."""

    def run() -> None:
        for _ in decode(bench, variant, force, prefill(bench, variant, force)):
            pass

    if bench.prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    live = LiveBytes()
    live.ignore([*bench.model.parameters(), *bench.model.buffers()])
    with live:
        run()
    return {"peak_mib": live.peak / 2**20}


def bytes_read(bench: Bench, variant: Variant, cache: Any, step: int) -> float:
    """Return the bytes that one decode step has to read: weights, keys and values."""
    keep = variant.steps[step] if variant.steps else variant.prompt
    share = {layer: float(tensor.mean()) for layer, tensor in keep.items()}
    target, _, unit = variant.granularity.partition("_")
    skips = {"attn", "mlp"} if target == "block" else {target}
    if unit == "token" and bench.kv == "keep":
        skips -= {"attn"}  # skipped tokens have keys and values, so attention is computed in full
    read = weight_bytes(bench.model, skips, [layer for layer, one in share.items() if not one])
    # A row that holds keys and values reads them at every step; a token does if it is kept.
    seen = share if unit == "token" and "attn" in skips else {}
    return read + sum(kv_bytes(one) * seen.get(i, 1.0) for i, one in enumerate(cache.layers))


def weight_bytes(model: Any, skips: set[str], skipped: Sequence[int]) -> int:
    """Return the bytes of the weights that are read when no row runs the `skipped` layers."""
    anatomy, table_in = find_decoder(model), model.get_input_embeddings()
    is_tied = anatomy.head is not None and anatomy.head.weight is table_in.weight
    total = size(model) - (0 if is_tied else size(table_in))  # of the table, rows are looked up
    for layer in (anatomy.layers[index] for index in skipped):
        sites = find_sites(layer, anatomy.model_type)
        parts = {"attn": sites.attention, "mlp": sites.mlp}
        total -= sum(size(getattr(layer, parts[part])) for part in skips)
    return total


def size(module: Any) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def kv_bytes(layer: Any) -> int:
    """Return the bytes of a cache layer's storages."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


# -- report


def speeds(
    turns: Sequence[Sequence[tuple[float, float]]], index: int, tokens: int
) -> dict[str, float]:
    """Return medians over turns, of times and of their ratios to dense in the same turn."""
    median = statistics.median
    return {
        "prefill_ms": 1e3 * median(turn[index][0] for turn in turns),
        "prefill_speedup": median(turn[0][0] / turn[index][0] for turn in turns),
        "decode_tokens_per_second": tokens / median(turn[index][1] for turn in turns),
        "decode_speedup": median(turn[0][1] / turn[index][1] for turn in turns),
    }


def ideals(counted: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Return the ratios to dense that the counts allow."""
    return {
        "prefill_ideal": dense["prefill_gflop"] / counted["prefill_gflop"],
        "decode_ideal": dense["decode_read_mib"] / counted["decode_read_mib"],
        "kv_share": counted["kv_mib"] / dense["kv_mib"],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    cells = [(title, format(row[name], kind)) for name, (title, kind) in COLUMNS.items()]
    return "  ".join(cell.rjust(len(title)) for title, cell in cells)


if __name__ == "__main__":
    main()
