"""What ZeRO-3 holds of a frozen backbone on a rank, from the shapes of its weights."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.parallel.ds_config import zero3_config


class KeptWeights:
    """The weights of which autograd keeps views from the forward to the backward pass.

    ZeRO-3 frees a gathered weight behind its module, but a view holds its memory. DeepSpeed's own
    linear function keeps none, so these are the stacked weights of a mixture's experts.
    """

    def __init__(self, model: nn.Module) -> None:
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        self._of_storage = {
            p.untyped_storage()._cdata: p for p in model.parameters() if id(p) not in linear
        }
        self._kept: dict[int, tuple[int, int]] = {}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return (elements, bytes of one) of each."""
        return list(self._kept.values())

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note what a forward pass keeps, outside of checkpoints, which keep none of it."""
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda saved: saved):
            yield

    def _note(self, saved: Tensor) -> Tensor:
        key = saved.untyped_storage()._cdata
        parameter = self._of_storage.get(key)
        if parameter is None:
            return saved
        # Of a weight as it is autograd keeps the tensor that ZeRO-3 empties.
        if (saved.shape, saved.stride()) != (parameter.shape, parameter.stride()):
            self._kept[key] = (parameter.numel(), parameter.element_size())
        return saved


def zero3_bytes(
    parameters: Sequence[tuple[int, int]],
    layer_numel: int,
    world_size: int,
    content: dict[str, Any],
    *,
    kept: Sequence[tuple[int, int]],
) -> tuple[int, int]:
    """Return (bytes kept on a rank, bytes of gathered parameters at the worst moment).

    `parameters` and `kept`, those that stay gathered until the backward pass, are (elements, bytes
    of one) each.
    """
    largest = max(n for n, _ in parameters)
    zero = zero3_config(content, layer_numel=layer_numel, largest_numel=largest)[
        "zero_optimization"
    ]
    threshold = zero["stage3_param_persistence_threshold"]
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    if world_size == 1 and not offloaded:
        return sum(n * s for n, s in parameters), 0  # DeepSpeed computes in the only partition
    partitions = sum(-(-n // world_size) * s for n, s in parameters)
    persistent = sum(n * s for n, s in parameters if n <= threshold)
    element = parameters[0][1]
    gathered = max(largest + layer_numel, min(2 * layer_numel, zero["stage3_max_live_parameters"]))
    secondary = zero.get("zero_hpz_partition_size", 1)
    shared = sum(-(-n // secondary) * s for n, s in parameters) if secondary > 1 else 0
    gathers = gathered * element + sum(n * s for n, s in kept if n > threshold)
    return persistent + (0 if offloaded else partitions) + shared, gathers
