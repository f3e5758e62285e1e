"""The gate for weights: whether the files of a model's folder are the weights of its config.

One function for every engine and command. It reads headers, builds the model without weights, and
applies the rules by which transformers loads. What differs is refused before anything is loaded.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megaskip.checkpoint.stored_weights import StoredTensor, holds_weights, read_stored_weights
from megaskip.errors import CheckpointError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.loading.conversion_check import missing_after_conversion
from megaskip.parallel.loading.packed_check import (
    NOT_OF_THE_CONFIG,
    NOTHING_BESIDE,
    Beside,
    require_packed,
    require_plain_head,
    without_companions,
)
from megaskip.parallel.loading.plain_types import (
    require_plain_config,
    require_plain_names,
    require_plain_types,
)
from megaskip.parallel.loading.quantised import packed_names
from megaskip.parallel.loading.skeleton import skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stored_values import same_values
from megaskip.parallel.loading.weight_plan import (
    PackedWeight,
    Renamed,
    WeightPlan,
    ignored_by_transformers,
    rename_as_transformers,
)
from megaskip.parallel.topology import Topology
from megaskip.routing import PREFIX

logger = get_logger(__name__)


def with_checked_weights(source: ModelSource, topology: Topology) -> ModelSource:
    """Return `source` with the plan of its weights, which the first rank makes and all get.

    Collective. Raises what `check_weights` does, on every rank.
    """
    if source.weights is not None:
        return source
    plan = on_first_rank(topology, lambda: check_weights(source))
    return dataclasses.replace(source, weights=plan)


def plan_of(source: ModelSource) -> WeightPlan:
    """Return the plan of a model's weights: of an earlier check, or else of one made here."""
    return check_weights(source) if source.weights is None else source.weights


def check_what_is_there(source: ModelSource) -> None:
    """Do as `check_weights`; for a folder without any weights, whose needs can be planned all the
    same, look at config.json alone."""
    if holds_weights(source.folder):
        check_weights(source)
        return
    require_plain_config(source.folder)
    logger.info("%s holds no weights: config.json alone is looked at", source.folder)


def check_weights(source: ModelSource, shape: Any | None = None) -> WeightPlan:
    """Return which stored tensor becomes which weight; logs once what of the folder is not read.

    `shape` is what is loaded, without weights, where it is not the one of `source`'s config. Raises
    CheckpointError for a folder that cannot be loaded alike on every engine: what
    `read_stored_weights` refuses; quantised weights; a weight that is missing, of another shape or
    there twice; tensors of layers or modules that the config does not have; a head that is stored
    though the config says that it is the embedding; of 4-bit weights what `require_packed` refuses.
    """
    folder = source.folder
    require_plain_config(folder)
    stored = read_stored_weights(folder)
    model: Any = skeleton(source) if shape is None else shape
    weights = model.state_dict()
    tensors, beside = stored.tensors, NOTHING_BESIDE
    if source.four_bit is not None and source.four_bit.is_stored:
        tensors, beside = without_companions(tensors)
    renamed = rename_as_transformers(model, tensors)
    extra = _extra(model, renamed, weights)
    require_plain_names(folder, extra)
    packed = _packed(source, model, weights, renamed, beside)
    direct = _direct(folder, renamed, weights, packed)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    direct |= _tied(folder, direct, tied)
    _require_shapes(source, direct, weights)
    missing = _without_own_tensor(model, weights, direct.keys() | packed.keys())
    if renamed.converted:
        _require_plain_parts(folder, renamed.converted)
        plain = [tensor for tensor in tensors.values() if tensor.name not in beside]
        missing = missing_after_conversion(source, model, plain, missing)
    _require_all(source, missing, len(weights), tensors)
    _require_no_other_model(folder, model, extra)
    converted = {n: t for n, t in renamed.converted.items() if n in weights}
    plan = WeightPlan(
        stored=direct,
        converted=converted,
        joined={n: converted[n] for n in converted if _keeps_rows(n, renamed, weights)},
        packed=packed,
        notes=tuple(_notes(extra, stored.unread)),
    )
    for note in plan.notes:
        logger.info("%s: %s", folder, note)
    return plan


def _packed(
    source: ModelSource,
    model: Any,
    weights: Mapping[str, Tensor],
    renamed: Renamed,
    beside: Beside,
) -> dict[str, PackedWeight]:
    """Return where the weights lie that are packed in the files; empty for a 16-bit folder."""
    if source.four_bit is None or not source.four_bit.is_stored:
        return {}
    asked = {name: weights[name] for name in packed_names(model, source.four_bit)}
    require_plain_head(source.folder, model, asked)
    return require_packed(source.folder, source.four_bit, asked, renamed.direct, beside)


def _direct(
    folder: Path, renamed: Renamed, weights: Mapping[str, Tensor], packed: Collection[str]
) -> dict[str, StoredTensor]:
    """Return the stored tensor of each weight that has one of its own and is not packed, once its
    type is plain."""
    direct: dict[str, StoredTensor] = {}
    for name, tensors in renamed.direct.items():
        if name not in weights:
            continue
        if len(tensors) > 1:
            raise CheckpointError(
                f"{folder}: {tensors[0].name} and {tensors[1].name} are both the model's {name}; "
                "keep one of them"
            )
        if name in packed:
            continue
        is_floating = weights[name].dtype.is_floating_point
        require_plain_types(folder, name, tensors, is_floating=is_floating)
        direct[name] = tensors[0]
    return direct


def _tied(
    folder: Path, direct: Mapping[str, StoredTensor], tied: Mapping[str, str]
) -> dict[str, StoredTensor]:
    """Return the stored tensors of tied weights under both names, once they are the same."""
    both: dict[str, StoredTensor] = {}
    for target, origin in tied.items():
        first, second = direct.get(origin), direct.get(target)
        if first is not None and second is not None and not same_values(folder, first, second):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings, but {second.name} is stored with "
                f"other values than {first.name}; set tie_word_embeddings to false to use it, or "
                "remove it from the files"
            )
        tensor = first or second
        if tensor is not None:
            both |= {origin: tensor, target: tensor}
    return both


def _without_own_tensor(
    model: Any, weights: Mapping[str, Tensor], own: Collection[str]
) -> dict[str, Tensor]:
    """Return the weights without `own` tensor in the files, but for those that a family may
    lack."""
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or "(?!)")
    return {n: w for n, w in weights.items() if n not in own and not optional.search(n)}


def _require_plain_parts(folder: Path, converted: Mapping[str, tuple[StoredTensor, ...]]) -> None:
    for name, tensors in converted.items():
        require_plain_types(folder, name, tensors, is_floating=True)


def _require_all(
    source: ModelSource, missing: Mapping[str, Tensor], total: int, stored: Iterable[str]
) -> None:
    """Raise CheckpointError when weights are `missing`; says what the reason looks like."""
    if not missing:
        return
    name = next(iter(missing))
    count = f"{len(missing)} of {total} weights are missing"
    prefixes = {s.removesuffix(name) for s in stored if s.endswith(f".{name}")}
    if prefixes:
        advice = (
            f"its names begin with {min(prefixes)!r}, which a wrapper put there: save the wrapped "
            "model itself"
        )
    elif name.startswith(f"{PREFIX}."):
        advice = "without its routers nothing would be skipped; convert the run again"
    elif stored_class := _other_class(source):
        advice = (
            f"config.json says that the files are of {stored_class}, and megaskip routes causal "
            "language models: give one with its output embedding"
        )
    elif name.endswith("lm_head.weight") and len(missing) == 1:
        advice = (
            "copy or download the model again; if its head is its embedding, set "
            "tie_word_embeddings to true in config.json"
        )
    else:
        advice = "copy or download the model again, or mend config.json if it asks for too much"
    raise CheckpointError(f"{source.folder}: no stored tensor is {name} ({count}); {advice}")


def _other_class(source: ModelSource) -> str:
    """Return the class that wrote the files where that is no causal language model, or ""."""
    classes = getattr(source.hf_config, "architectures", None) or [""]
    is_causal = str(classes[0]).endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration"))
    return "" if is_causal else str(classes[0])


def _require_shapes(
    source: ModelSource, direct: Mapping[str, StoredTensor], weights: Mapping[str, Tensor]
) -> None:
    for name, tensor in direct.items():
        asked = tuple(weights[name].shape)
        if tensor.shape == asked:
            continue
        vocabulary = getattr(source.text_config, "vocab_size", None)
        if asked[1:] == tensor.shape[1:] and asked[:1] == (vocabulary,):
            why = f"vocab_size is {vocabulary} there; mend it, or name the right folder"
        else:
            why = NOT_OF_THE_CONFIG
        raise CheckpointError(
            f"{source.folder}: {tensor.name} has shape {tensor.shape}, config.json asks for "
            f"{asked}; {why}"
        )


def _keeps_rows(name: str, renamed: Renamed, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a weight that is joined consists of the rows of stored matrices."""
    width = weights[name].shape[-1:]
    return name in renamed.joined and all(
        len(tensor.shape) == 2 and tensor.shape[1:] == width for tensor in renamed.converted[name]
    )


# -- what is in the files and not in the model


def _extra(model: Any, renamed: Renamed, weights: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of the files that become no weight, by the names they would have."""
    names = [name for name in (*renamed.direct, *renamed.converted) if name not in weights]
    return [
        name
        for name in names
        if not name.startswith(f"{PREFIX}.") and not ignored_by_transformers(model, name)
    ]


def _require_no_other_model(folder: Path, model: Any, extra: Iterable[str]) -> None:
    """Raise CheckpointError when what is extra shows that the files are another model's: tensors of
    further layers, or of modules that the model computes with."""
    modules = dict(model.named_modules())
    stack, depth = _layers(model, modules)
    in_layer = re.compile(rf"{re.escape(stack)}\.(\d+)\." if stack else "(?!)")
    for name in extra:
        match = in_layer.match(name)
        if match is not None and int(match[1]) >= depth:
            raise CheckpointError(
                f"{folder}: config.json says {depth} layers (num_hidden_layers), and the files "
                f"hold {name}; mend config.json, or remove the tensors of further layers"
            )
        parent = modules.get(name.rpartition(".")[0])
        computes = parent is not None and next(parent.parameters(recurse=False), None) is not None
        if match is not None or computes:
            raise CheckpointError(
                f"{folder}: the files hold {name}, for which {type(model).__name__} has no place; "
                f"{NOT_OF_THE_CONFIG} (see its model_type)"
            )


def _layers(model: Any, modules: Mapping[str, Any]) -> tuple[str, int]:
    """Return (name, depth) of the stack of decoder layers; ("", 0) where it is not found."""
    get_decoder = getattr(model, "get_decoder", None)
    layers = getattr(get_decoder() if get_decoder else model, "layers", None)
    for name, module in modules.items():
        if layers is not None and module is layers:
            return name, len(layers)
    return "", 0


def _notes(extra: list[str], unread: tuple[str, ...]) -> Iterable[str]:
    """Yield what of a folder is not read."""
    if extra:
        yield f"{len(extra)} stored tensor(s) are not in the model, such as {min(extra)}"
    if unread:
        yield f"{len(unread)} weight file(s) do not count, such as {unread[0]}"
