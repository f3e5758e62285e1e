"""Weights of some layers whose stored form transformers converts, as it fuses MoE experts."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megaskip.arch.stage import LayerRange
from megaskip.errors import MegaskipError
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stored_values import read_stored
from megaskip.parallel.loading.weight_plan import WeightPlan

_LAYER = re.compile(r"(?:(?<=^layers\.)|(?<=\.layers\.))\d+(?=\.)")


def makes_same_layers(model: Any, layers: LayerRange) -> bool:
    """Return whether a model of these layers alone has the same ones: not where what a layer is
    depends on its number, as in models whose first layers have no experts, nor where a model has
    other stacks of layers, such as an encoder of pictures."""
    if model.config.get_text_config(decoder=True) is not model.config:
        return False
    with torch.device("meta"):
        alone = type(model)(_config_of(model.config, layers))
    shapes = {_renumbered(n, layers.first): p.shape for n, p in alone.named_parameters()}
    whole = {n: p.shape for n, p in model.named_parameters() if _belongs(n, layers, set())}
    return all(shapes.get(name) == shape for name, shape in whole.items())


def load_converted(
    model: nn.Module,
    layers: LayerRange,
    wanted: set[str],
    plan: WeightPlan,
    source: ModelSource,
) -> dict[str, Tensor]:
    """Return the tensors of some layers in the form that `model` (its weights may be on the meta
    device) has them, by its names.

    A model of these layers alone is loaded by transformers, on the CPU; of stored tensors that
    belong to no layer those in `wanted` are read. What is packed in the files has no values in
    it. Raises MegaskipError for what is missing.
    """
    stored = dict(_stored(layers, wanted, plan, source))
    level = transformers.utils.logging.get_verbosity()
    # What these layers lack on purpose is not worth a report.
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded, info = type(model).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=_config_of(model.config, layers),
            state_dict=stored,
            dtype=source.dtype,
            output_loading_info=True,
        )
    finally:
        transformers.utils.logging.set_verbosity(level)
    missing = sorted(
        name
        for name in info["missing_keys"]
        if _LAYER.search(name) and _renumbered(name, layers.first) not in plan.packed
    )
    if missing:
        raise MegaskipError(
            f"no stored tensor becomes {_renumbered(missing[0], layers.first)}, and "
            f"{len(missing) - 1} more of layers {layers.first} to {layers.stop - 1}; is the model "
            "folder complete?"
        )
    return {_renumbered(name, layers.first): t for name, t in loaded.state_dict().items()}


def _config_of(config: Any, layers: LayerRange) -> Any:
    """Return the config of a model of these layers alone: of everything that has an entry for each
    layer it has theirs."""
    alone = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == layers.depth:
            setattr(alone, name, value[layers.first : layers.stop])
    alone.num_hidden_layers = layers.stop - layers.first
    return alone


def _stored(
    layers: LayerRange, wanted: set[str], plan: WeightPlan, source: ModelSource
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of some layers, the first of them numbered 0."""
    tensors = dict(plan.stored)
    tensors |= {tensor.name: tensor for group in plan.converted.values() for tensor in group}
    mine = {name: stored for name, stored in tensors.items() if _belongs(name, layers, wanted)}
    for name, tensor in read_stored(source.folder, mine):
        yield _renumbered(name, -layers.first), tensor


def _belongs(name: str, layers: LayerRange, wanted: set[str]) -> bool:
    number = _LAYER.search(name)
    return layers.first <= int(number[0]) < layers.stop if number else name in wanted


def _renumbered(name: str, by: int) -> str:
    """Return a tensor's name, the number of its layer, if it has one, raised by `by`."""
    return _LAYER.sub(lambda number: str(int(number[0]) + by), name, count=1)
