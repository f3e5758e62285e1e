"""Weights of a slice of layers whose stored form transformers converts, as it fuses MoE experts."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaskip.arch.stage import Slice, config_slice
from megaskip.errors import MegaskipError

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def is_a_model(model: Any, part: Slice) -> bool:
    """Return whether the slice by itself makes the same layers: not where what a layer is depends
    on its number, as in models whose first layers have no experts."""
    with torch.device("meta"):
        alone = type(model)(config_slice(model.config, part))
    shapes = {_moved(n, part.first): p.shape for n, p in alone.named_parameters()}
    whole = {n: p.shape for n, p in model.named_parameters() if _belongs(n, part, set())}
    return all(shapes.get(name) == shape for name, shape in whole.items())


def converted(
    model: nn.Module, part: Slice, wanted: set[str], shards: Mapping[str, Path], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a slice in the form that `model` (its weights may be on the meta
    device) has them, by its names.

    A model of the slice's layers alone is loaded by transformers, on the CPU; of stored tensors
    that belong to no layer those in `wanted` are read. Raises MegaskipError for what is missing.
    """
    stored = dict(_stored(part, wanted, shards))
    level = transformers.utils.logging.get_verbosity()
    # What this slice lacks on purpose is not worth a report.
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded, info = type(model).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=config_slice(model.config, part),
            state_dict=stored,
            dtype=dtype,
            output_loading_info=True,
        )
    finally:
        transformers.utils.logging.set_verbosity(level)
    missing = sorted(name for name in info["missing_keys"] if _LAYER.search(name))
    if missing:
        raise MegaskipError(
            f"no stored tensor becomes {_moved(missing[0], part.first)}, and {len(missing) - 1} "
            f"more of layers {part.first} to {part.stop - 1}; is the model folder complete?"
        )
    return {_moved(name, part.first): tensor for name, tensor in loaded.state_dict().items()}


def _stored(
    part: Slice, wanted: set[str], shards: Mapping[str, Path]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of a slice, its first layer numbered 0."""
    for file in sorted(set(shards.values())):
        names = [n for n, at in shards.items() if at == file and _belongs(n, part, wanted)]
        if not names:
            continue
        try:
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    yield _moved(name, -part.first), handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise MegaskipError(f"{file}: cannot read the weights ({error})") from None


def _belongs(name: str, part: Slice, wanted: set[str]) -> bool:
    layer = _LAYER.search(name)
    return part.first <= int(layer[0]) < part.stop if layer else name in wanted


def _moved(name: str, by: int) -> str:
    """Return a tensor's name with the number of its layer, if any, moved."""
    return _LAYER.sub(lambda number: str(int(number[0]) + by), name, count=1)
