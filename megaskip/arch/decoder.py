"""The parts of an HF decoder: its base model, its layers, its head. Knows attribute names only."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from megaskip.errors import UnsupportedModelError
from megaskip.routing import PREFIX


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """A decoder-only model's parts."""

    decoder: nn.Module
    """The base model, which turns token ids into hidden states."""
    layers: nn.ModuleList
    head: nn.Module | None
    """The output embedding, when the model has one."""
    hidden_size: int
    model_type: str


def find_decoder(model: nn.Module) -> DecoderParts:
    """Return the parts of an HF decoder; raises UnsupportedModelError when its layers cannot be
    found."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else model
    layers = getattr(decoder, "layers", None)
    config = getattr(model, "config", None)
    if config is None or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no list of decoder layers at get_decoder().layers; "
            "megaskip routes Hugging Face decoder-only models (see the support matrix in the "
            "README)"
        )
    get_head = getattr(model, "get_output_embeddings", None)
    text_config = config.get_text_config(decoder=True)
    return DecoderParts(
        decoder=decoder,
        layers=layers,
        head=get_head() if get_head else None,
        hidden_size=text_config.hidden_size,
        # An exported model has a type of its own and names its family besides.
        model_type=getattr(config, "base_model_type", config.model_type),
    )


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
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


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
