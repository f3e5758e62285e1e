"""What a variant computes, moves and holds: counted, not timed."""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import StaticLayer

from megaskip.arch import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.bench.memory import peak_of
from megaskip.bench.variants import Bench, Override, Variant, decode, prefill
from megaskip.inference.dropped import Substitute
from megaskip.routing import PREFIX


def account(bench: Bench, variant: Variant, override: Override) -> dict[str, float]:
    """Return what a variant computes in prefill, and what it moves and holds in decode."""
    with FlopCounterMode(display=False, custom_mapping=attention_formulas()) as counter:
        cache = prefill(bench, variant, override)
    steps = decode(bench, variant, override, cache)
    moved = statistics.mean(bytes_moved(bench, variant, cache, step) for step in steps)
    return {
        "prefill_gflop": counter.get_total_flops() / 1e9,
        "decode_moved_mib": moved / 2**20,
        "kv_mib": cache_bytes(cache) / 2**20,
    }


def attention_formulas() -> dict[Any, Any]:
    """Return FLOPs of fused attention: torch counts none on a CPU, and asks for equal heads."""

    def flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, queries, width = query
        return int(2 * batch * heads * queries * key[2] * (width + value[3]))

    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    operators = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}") for name in names]
    return dict.fromkeys(operators, flops)


def peak(bench: Bench, variant: Variant, override: Override) -> dict[str, float]:
    """Return the peak of prefill and decode, beyond what lives already."""

    def run() -> None:
        for _ in decode(bench, variant, override, prefill(bench, variant, override)):
            pass

    kept = [*bench.model.parameters(), *bench.model.buffers()]
    return {"peak_mib": peak_of(run, bench.prompt.device, kept) / 2**20}


def bytes_moved(bench: Bench, variant: Variant, cache: Any, step: int) -> float:
    """Return the bytes that a decode step has to read and write: weights, keys and values.

    A cache that grows copies its keys and values at each step, which reads and writes all of them
    once more than attention reads them.
    """
    keep = variant.steps[step] if variant.steps else variant.prompt
    share = {layer: float(tensor.mean()) for layer, tensor in keep.items()}
    skips = set(variant.skips)
    by_token = variant.granularity.endswith("token")
    if by_token and variant.kv == "keep":
        skips -= {"attn"}  # skipped tokens have keys and values, so attention is computed in full
    moved = weight_bytes(bench.model, skips, [layer for layer, kept in share.items() if not kept])
    moved -= sum(map(size, idle_maps(bench.model, share)))
    # A row that holds keys and values reads them at every step; a token does if it is kept.
    seen = share if by_token and "attn" in skips else {}
    return moved + sum(
        kv_bytes(layer) * (seen.get(index, 1.0) + copies(layer))
        for index, layer in enumerate(cache.layers)
    )


def copies(cache_layer: Any) -> int:
    """Return how often a step reads or writes all of a cache layer to make room for a token."""
    return 0 if isinstance(cache_layer, StaticLayer) else 2


def weight_bytes(model: Any, skips: set[str], skipped: Sequence[int]) -> int:
    """Return the bytes of the weights that are read when no row runs the `skipped` layers."""
    parts, table_in = find_decoder(model), model.get_input_embeddings()
    is_tied = parts.head is not None and parts.head.weight is table_in.weight
    total = size(model) - (0 if is_tied else size(table_in))  # of the table, rows are looked up
    for layer in (parts.layers[index] for index in skipped):
        sites = find_sites(layer, parts.model_type)
        names = {"attn": sites.attention, "mlp": sites.mlp}
        sublayers = [getattr(layer, names[target]) for target in skips]
        # What stands in the place of a dropped sublayer is read.
        total -= sum(size(module) for module in sublayers if not isinstance(module, Substitute))
    return total


def idle_maps(model: Any, share: dict[int, float]) -> list[Any]:
    """Return the compensations of layers that every row runs, which nobody reads."""
    routers = getattr(model, PREFIX, None)
    if routers is None or routers.config.compensation == "none":
        return []
    return [routers.router(layer).compensation for layer, kept in share.items() if kept == 1]


def size(module: Any) -> int:
    """Return the bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's storages."""
    return sum(map(kv_bytes, cache.layers))


def kv_bytes(layer: Any) -> int:
    """Return the bytes of a cache layer's storages."""
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def ideals(counted: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Return the ratios to dense that the counts allow."""
    return {
        "prefill_ideal": dense["prefill_gflop"] / counted["prefill_gflop"],
        "decode_ideal": dense["decode_moved_mib"] / counted["decode_moved_mib"],
        "kv_share": counted["kv_mib"] / dense["kv_mib"],
    }
