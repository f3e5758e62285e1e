"""Which stored tensor becomes which weight of a model, as plain data that ranks can exchange."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from megaskip.checkpoint.stored_weights import StoredTensor

_JOINS = {"MergeModulelist", "Concatenate"}
"""Operations of transformers after which matrices still have their rows, if they are as wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight that bitsandbytes has packed in 4 bit, and where it lies."""

    weight: StoredTensor
    """uint8 [n/2, 1]: two of its n numbers a byte."""
    beside: Mapping[str, StoredTensor]
    """What it is restored from, by what follows its name in theirs: absmax, quant_map, ..."""
    shape: tuple[int, ...]
    """Of what is restored."""
    blocksize: int
    """Numbers with one scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """Where each weight of a model comes from, and what of its folder is not read."""

    stored: Mapping[str, StoredTensor]
    """By the model's names: what becomes a parameter or buffer as it is, but for its type. Both
    names of tied weights are there."""
    converted: Mapping[str, tuple[StoredTensor, ...]]
    """By the model's names: what transformers joins or splits, such as experts. Where several
    weights come of it, under the first of them."""
    joined: Mapping[str, tuple[StoredTensor, ...]]
    """Of `converted`, the weights that consist of the rows of all these matrices."""
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    """By the model's names: what is packed in 4 bit, and in none of the others."""
    notes: tuple[str, ...] = ()
    """What is in the folder and not in the model, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """Stored tensors by the names that transformers gives them on loading."""

    direct: Mapping[str, tuple[StoredTensor, ...]]
    converted: Mapping[str, tuple[StoredTensor, ...]]
    joined: frozenset[str]
    """Names in `converted` that are stacked and concatenated, and nothing else."""


def rename_as_transformers(model: Any, tensors: Mapping[str, StoredTensor]) -> Renamed:
    """Return `tensors` by the names of `model`, whose weights may be on the meta device.

    As transformers.core_model_loading.convert_and_load_state_dict_in_model does it; names that the
    model has no weight for stay.
    """
    weights = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    direct: dict[str, list[StoredTensor]] = {}
    converted: dict[str, list[StoredTensor]] = {}
    joining = {
        pattern
        for converter in converters
        if all(type(operation).__name__ in _JOINS for operation in converter.operations)
        for pattern in converter.source_patterns
    }
    joined: set[str] = set()
    for name, tensor in tensors.items():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, weights)
        if renamed not in weights and name in weights:
            renamed, pattern = rename_source_key(name, [], [], prefix, weights)
        (direct if pattern is None else converted).setdefault(renamed, []).append(tensor)
        if pattern in joining:
            joined.add(renamed)
    return Renamed(direct=_frozen(direct), converted=_frozen(converted), joined=frozenset(joined))


def _frozen(groups: Mapping[str, list[StoredTensor]]) -> dict[str, tuple[StoredTensor, ...]]:
    return {name: tuple(tensors) for name, tensors in groups.items()}


def ignored_by_transformers(model: Any, name: str) -> bool:
    """Return whether the family drops a stored tensor on purpose, such as old position buffers."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    patterns += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return any(re.search(pattern, name) for pattern in patterns)
