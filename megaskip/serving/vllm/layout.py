"""Where the sublayers of a vLLM model are, and what vLLM notes about them besides.

vLLM's layers have the children of transformers' under the same names, with few exceptions.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.sites import SUBLAYERS, Sites, find_sites
from megaskip.errors import UnsupportedModelError

NAMES = {**SUBLAYERS, "attn": (*SUBLAYERS["attn"], "attn")}
"""Names of sublayers: gpt_oss calls its attention attn."""


def layers_here(model: Any) -> Iterator[tuple[int, nn.Module]]:
    """Yield (index, layer) of the decoder layers that this process holds."""
    decoder = model.model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__}: vLLM's class has no list of decoder layers at model.layers, "
            "so megaskip cannot change it"
        )
    start = getattr(decoder, "start_layer", 0)
    for index in range(start, getattr(decoder, "end_layer", len(layers))):
        yield index, layers[index]


def sites_of(layer: nn.Module, family: str) -> Sites:
    """Return the names of a layer's sublayers, and where their updates meet the residual."""
    return find_sites(layer, family, NAMES)


def hidden_states_of(forward: Any) -> tuple[str, int]:
    """Return the name and the position of the argument of a sublayer's forward that it reads."""
    names = list(inspect.signature(forward).parameters)
    name = "hidden_states" if "hidden_states" in names else names[0]
    return name, names.index(name)


def read_argument(reads: tuple[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a sublayer reads [N, D] from the arguments of its call."""
    name, position = reads
    tensor: Tensor = kwargs[name] if name in kwargs else args[position]
    return tensor


def names_of_attention(sublayer: nn.Module, compilation_config: Any) -> list[str]:
    """Return the names under which vLLM notes the attention layers inside of a sublayer."""
    inside = {id(module) for module in sublayer.modules()}
    noted = compilation_config.static_forward_context
    return [name for name, layer in noted.items() if id(layer) in inside]


def forget(sublayer: nn.Module, compilation_config: Any) -> None:
    """Take a sublayer's layers out of what vLLM notes: no keys and values are allotted to them."""
    for name in names_of_attention(sublayer, compilation_config):
        del compilation_config.static_forward_context[name]
        if name in compilation_config.static_all_moe_layers:
            compilation_config.static_all_moe_layers.remove(name)


def put(parameter: nn.Parameter, tensor: Tensor, name: str) -> None:
    """Load a stored tensor; raises ValueError where its shape is another."""
    if parameter.shape != tensor.shape:
        raise ValueError(
            f"{name} is stored as {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
        )
    with torch.no_grad():
        parameter.copy_(tensor)
