"""Prefill and decode: dense, routed, with sublayers dropped, on one model of random weights."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from megaskip.bench.attempts import OUT_OF_MEMORY, Attempts
from megaskip.bench.costs import map_flops, prefill_flops
from megaskip.bench.counters import count_calls
from megaskip.bench.counts import bytes_moved, cache_bytes, peak, size
from megaskip.bench.parts import Part
from megaskip.bench.setup import Row, Setup, Snapshots
from megaskip.bench.shapes import SHAPES, Shape, build, config_of
from megaskip.bench.timing import Pairs, Sample, Stopwatch, of_base, speedup, timed_pairs
from megaskip.bench.variants import (
    DENSE,
    Bench,
    Override,
    Variant,
    decode,
    dropped,
    first_steps,
    prefill,
    routed,
    static,
    wired,
    with_maps,
)
from megaskip.config import resolve_layers

_RANK = 64
"""Of maps: the default of --compensation_rank."""
_PROFILED_TOKENS = 70_000
"""Batches of more tokens are not profiled: a profile of one takes as long as several runs."""


@torch.no_grad()
def measure_serving(part: Part, setup: Setup) -> Snapshots:
    """Yield the rows of one batch size and prompt length, dense first."""
    torch.manual_seed(0)
    shape = SHAPES[part.shape]
    model = build(config_of(shape), setup.device, setup.dtype)
    ids = torch.randint(
        shape.vocabulary, (part.batch, part.prompt + part.steps), device=setup.device
    )
    prompt, answer = ids.tensor_split([part.prompt], dim=1)
    layers = resolve_layers("half", shape.layers)
    bench = Bench(model=model, layers=layers, prompt=prompt, answer=answer)
    variants = [DENSE, *compared(bench)]
    observed: dict[int, Row] = {}

    def observe(index: int) -> None:
        with wired(bench, variants[index]) as override:
            observed[index] = _observed(bench, variants[index], override, shape)

    def run(index: int) -> Sample:
        with wired(bench, variants[index]) as override:
            return timed(bench, variants[index], override, setup.watch)

    attempts = Attempts(run, observe, base=0)
    names = range(1, len(variants))
    for pairs in timed_pairs(attempts, names, 0, setup.limits(part.turns)):
        yield _rows(part, setup, bench, variants, pairs, observed, attempts.failed)


def compared(bench: Bench) -> list[Variant]:
    """Return what is compared with dense, by value: whole blocks first, halves last."""
    variants = []
    for granularity in ("block_sequence", "attn_sequence", "mlp_sequence"):
        variants += [
            routed(bench, granularity, "keep", 0.0),
            static(bench, granularity, 0.0),
            dropped(bench, granularity, 0.0),
            *(_attention_with_maps(bench) if granularity == "attn_sequence" else ()),
            routed(bench, granularity, "keep", 1.0),
        ]
    # With everything running there is one of it: the same steps whatever is routed.
    variants.insert(2, static(bench, "block_sequence", 1.0))
    halves = ("block_sequence", "attn_sequence")
    variants += [routed(bench, granularity, "keep", 0.5) for granularity in halves]
    return [*variants, static(bench, "block_sequence", 0.5)]


def _attention_with_maps(bench: Bench) -> list[Variant]:
    """Return the variants that show what maps cost in the places of attentions."""
    skips = routed(bench, "attn_sequence", "keep", 0.0), dropped(bench, "attn_sequence", 0.0)
    return [with_maps(variant, _RANK) for variant in skips]


def timed(bench: Bench, variant: Variant, override: Override, watch: Stopwatch) -> Sample:
    """Return the seconds of prefill, of all decode steps as if they were like the last ones, and of
    the first ones that were not."""
    begun = watch.now()
    cache = prefill(bench, variant, override)
    filled = watch.now()
    steps, first = decode(bench, variant, override, cache), first_steps(bench, variant)
    for _ in itertools.islice(steps, first):
        pass
    ready = watch.now()
    for _ in steps:
        pass
    total = bench.answer.shape[1]
    return filled - begun, (watch.now() - ready) * total / (total - first), ready - filled


def speeds(pairs: Sequence[tuple[Sample, Sample]], steps: int, batch: int) -> Row:
    """Return medians over pairs: times, and speed-ups over dense with their standard errors."""
    row: Row = {}
    for index, phase in enumerate(("prefill", "decode")):
        ratio = speedup(pairs, index)
        row |= {f"{phase}_speedup": ratio.value, f"{phase}_error": ratio.error}
    step = statistics.median(own[1] for _, own in pairs) / steps
    return row | {
        "prefill_ms": 1e3 * statistics.median(own[0] for _, own in pairs),
        "decode_ms": 1e3 * step,
        "decode_tokens_per_second": batch / step,
    }


def _observed(bench: Bench, variant: Variant, override: Override, shape: Shape) -> Row:
    """Run a variant once, which also warms it up; return what it holds, moves and launches."""
    cache: Any = None

    def fill() -> None:
        nonlocal cache
        cache = prefill(bench, variant, override)

    row: Row = {}
    profiled = bench.prompt.numel() <= _PROFILED_TOKENS
    device = bench.prompt.device
    if profiled:
        row |= {f"prefill_{k}": v for k, v in count_calls(fill, device).items()}
    else:
        fill()
    steps: Any = decode(bench, variant, override, cache)
    *_, last = itertools.islice(steps, max(first_steps(bench, variant), 1))
    if profiled:
        row |= {f"decode_{k}": v for k, v in count_calls(lambda: next(steps), device).items()}
        last += 1
    row["decode_moved_bytes"] = bytes_moved(bench, variant, cache, last)
    row["kv_bytes"] = cache_bytes(cache)
    row["weight_bytes"] = size(bench.model)
    cache = None  # of two caches at once, one would be counted as a temporary
    steps.close()
    row["peak_bytes"] = peak(bench, variant, override)["peak_mib"] * 2**20
    attention, mlp = (
        1 - (1 - variant.kept) * len(variant.prompt) / shape.layers * (target in variant.skips)
        for target in ("attn", "mlp")
    )
    tokens = bench.prompt.shape
    row["prefill_flops"] = prefill_flops(shape, *tokens, attention=attention, mlp=mlp)
    skipped = (1 - variant.kept) * len(variant.prompt) * bench.prompt.numel()
    row["prefill_flops"] += map_flops(shape, variant.rank, skipped)
    return row


def _rows(
    part: Part,
    setup: Setup,
    bench: Bench,
    variants: Sequence[Variant],
    pairs: Pairs[int],
    observed: dict[int, Row],
    failed: set[Any],
) -> list[Row]:
    rows = []
    for index, variant in enumerate(variants):
        row: Row = {"table": "serve", "shape": part.shape, "batch": part.batch}
        row |= {"prompt": part.prompt, "variant": variant.name, "kept": variant.kept}
        row |= {"granularity": variant.granularity, "steps": part.steps}
        own = pairs[index] if index else of_base(pairs)
        if index in failed:
            rows.append(row | {"failure": OUT_OF_MEMORY})
        elif own:
            row |= observed[index] | speeds(own, part.steps, part.batch) | {"pairs": len(own)}
            if variants[index].static:
                row["decode_start_ms"] = 1e3 * statistics.median(sample[2] for _, sample in own)
            rows.append(row | _shares(row, observed[0], setup))
    return rows


def _shares(row: Row, dense: Row, setup: Setup) -> Row:
    """Return what dense allows for, and what of the device's peaks is used."""
    rate = row["prefill_flops"] / (row["prefill_ms"] / 1e3)
    traffic = row["decode_moved_bytes"] / (row["decode_ms"] / 1e3)
    shares = {
        "prefill_ideal": dense["prefill_flops"] / row["prefill_flops"],
        "decode_ideal": dense["decode_moved_bytes"] / row["decode_moved_bytes"],
        "prefill_mfu": rate / setup.speeds.flops,
        "decode_bandwidth_share": traffic / setup.speeds.bandwidth,
    }
    return {name: share if math.isfinite(share) else None for name, share in shares.items()}
