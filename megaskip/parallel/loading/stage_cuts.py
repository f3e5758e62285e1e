"""Where a pipeline is cut: so that the busiest stage does as little as possible. Pure arithmetic.

Work is counted in multiply-adds per token: forward 1 x weights, backward 1 x (gradients of inputs;
frozen weights have none), recomputation 1 x. Layers below the lowest routed one have no backward.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megaskip.arch import find_decoder
from megaskip.arch.adapters import find_adapted_layers
from megaskip.arch.stage import LayerRange, layer_ranges
from megaskip.config import RunConfig, resolve_layers
from megaskip.errors import ConfigError


def cuts_for_training(shape: nn.Module, config: RunConfig) -> tuple[LayerRange, ...]:
    """Return the layers of each stage; `shape` is the whole model, which may be on the meta device.

    Raises ConfigError when there are fewer layers than stages, or a given boundary is no layer.
    """
    depth, parallel = len(find_decoder(shape).layers), config.parallel
    given = parallel.boundaries()
    if given is None:
        lowest = resolve_layers(config.router.layers, depth)[0]
        if config.adapter.lora_rank:
            adapted = find_adapted_layers(shape, config.adapter)
            lowest = min(lowest, *(layer.layer for layer in adapted))
        recompute = parallel.activation_checkpointing
        return _balanced(shape, parallel.pipeline_stages, lowest, recompute=recompute)
    _require_layers(parallel.pipeline_stages, depth)
    if given and given[-1] >= depth:
        raise ConfigError(
            f"--pipeline_partition {parallel.pipeline_partition}: the model has layers 0 to "
            f"{depth - 1}"
        )
    return layer_ranges(given, depth)


def cuts_for_inference(shape: nn.Module, num_stages: int) -> tuple[LayerRange, ...]:
    """Return the layers of each stage, which have no backward pass; arguments and errors as in
    `cuts_for_training`."""
    return _balanced(shape, num_stages, len(find_decoder(shape).layers), recompute=False)


def _balanced(
    shape: nn.Module, num_stages: int, lowest: int, *, recompute: bool
) -> tuple[LayerRange, ...]:
    costs = layer_costs(shape, lowest, recompute=recompute)
    _require_layers(num_stages, len(costs))
    return layer_ranges(balance(costs, num_stages), len(costs))


def _require_layers(num_stages: int, depth: int) -> None:
    if num_stages > depth:
        raise ConfigError(f"--pipeline_stages {num_stages}: the model has {depth} layers only")


def layer_costs(model: nn.Module, lowest: int, *, recompute: bool) -> list[float]:
    """Return the work of each layer; the last one's includes the output embedding's. Layers from
    `lowest` on have a backward pass."""
    parts = find_decoder(model)
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    passes = 3 if recompute else 2
    costs = [
        _active_weights(layer, config) * (passes if index >= lowest else 1)
        for index, layer in enumerate(parts.layers)
    ]
    if parts.head is not None:
        costs[-1] += 2 * sum(p.numel() for p in parts.head.parameters())
    return costs


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Return the cuts of `costs` into contiguous, non-empty groups with the least largest sum."""
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][stop]: (largest sum, last cut) of the first `stop` layers in s + 1 groups.
    best = [[(sums[stop], 0) for stop in range(count + 1)]]
    for groups in range(1, stages):
        row = [(float("inf"), 0)] * (count + 1)
        for stop in range(groups + 1, count + 1):
            row[stop] = min(
                (max(best[-1][cut][0], sums[stop] - sums[cut]), cut) for cut in range(groups, stop)
            )
        best.append(row)
    cuts: list[int] = []
    stop = count
    for row in reversed(best[1:]):
        stop = row[stop][1]
        cuts.insert(0, stop)
    return cuts


def _active_weights(layer: nn.Module, config: Any) -> float:
    """Return the weights that a token meets: of fused experts, as many as it is sent to."""
    chosen: Any = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for parameter in layer.parameters():
        is_experts = parameter.dim() == 3 and chosen is not None
        total += parameter.numel() * (chosen / parameter.shape[0] if is_experts else 1)
    return total
