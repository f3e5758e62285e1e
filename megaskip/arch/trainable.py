"""What trains of a model: its routers and nothing else, and how that is said."""

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from megaskip.routing import PREFIX


def freeze(model: nn.Module) -> list[str]:
    """Let nothing train but the routers and return the names that still do.

    Only names that start with `skip_routers.` train: a substring test would unfreeze the MoE
    routers that 14 families of transformers own.
    """
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(f"{PREFIX}."))
        if parameter.requires_grad:
            trainable.append(name)
    return trainable


def describe_layers(layers: Iterable[int]) -> str:
    """Return layer indices as ranges, e.g. 15-30 or 3-5,9."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def describe_trainable(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the exact list of routers that train, by name and shape, in one short line."""
    by_target: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, shape in shapes.items():
        layer, rest = name.split(".", 1)
        by_target.setdefault((rest, tuple(shape)), []).append(int(layer))
    return "; ".join(
        f"{PREFIX}.{{{describe_layers(layers)}}}.{rest} [{', '.join(map(str, shape))}]: "
        f"{len(layers)} tensors, {len(layers) * math.prod(shape):,} parameters, float32"
        for (rest, shape), layers in by_target.items()
    )
