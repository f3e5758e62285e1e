"""An adapter added to the weights that it adapts, in copied shards of the base."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megaskip.checkpoint.header import read_header
from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import UnsupportedModelError
from megaskip.parallel.loading.weight_plan import WeightPlan
from megaskip.routing.adapters import AdaptedLayer, AdapterSet

MERGED = "merged"
"""What a routed config says of an adapter that is part of the weights."""


def merged_tensors(
    adapters: AdapterSet, plan: WeightPlan, base: Path
) -> dict[AdaptedLayer, StoredTensor]:
    """Return the stored tensor of each weight that is adapted.

    Raises UnsupportedModelError when one is not stored as it is, but joined with others or packed.
    """
    chosen = {}
    for layer in adapters.layers:
        name = f"{adapters.name_of(layer)}.weight"
        if name not in plan.stored:
            raise UnsupportedModelError(
                f"{base} does not store {name} as it is, but joined with others or packed in 4 "
                "bit, so --merge cannot add the adapter to it; leave --merge out"
            )
        chosen[layer] = plan.stored[name]
    return chosen


def merged_files(adapters: AdapterSet, plan: WeightPlan, base: Path) -> set[str]:
    """Return the files of `base` whose content changes; raises as `merged_tensors`."""
    return {stored.file for stored in merged_tensors(adapters, plan, base).values()}


def merge_adapter(
    folder: Path,
    names: Mapping[str, str],
    adapters: AdapterSet,
    plan: WeightPlan,
    base: Path,
    *,
    without: Collection[str] = (),
) -> None:
    """Add an adapter to the copies in `folder` of the shards of `base`; `names` has what a file is
    called there, `without` the stored tensors that it lacks. In float32, rounded once to the stored
    type; one weight at a time is in memory."""
    for layer, stored in merged_tensors(adapters, plan, base).items():
        if stored.name in without:
            continue
        path = folder / names.get(stored.file, stored.file)
        with safe_open(path, framework="pt") as handle:
            weight = handle.get_tensor(stored.name)
        content = merged(weight, adapters.delta(layer)).contiguous()
        header, start = read_header(path)  # a shard that lost tensors has others' offsets
        with open(path, "r+b") as file:
            file.seek(start + header[stored.name]["data_offsets"][0])
            file.write(content.view(torch.uint8).numpy().tobytes())


def merged(weight: Tensor, delta: Tensor) -> Tensor:
    """Return a weight [E, D] with `delta` added in float32, in its own type."""
    return (weight.float() + delta.to(weight.device)).to(weight.dtype)
