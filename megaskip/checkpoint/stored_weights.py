"""What the weight files of a model's folder hold: names, types and shapes, from headers alone.

Knows files, not models. Which file counts where there are several is decided here, by the rule that
transformers has; where its rule and the index do not agree, the folder is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.header import METADATA, read_header, require_no_pointer
from megaskip.checkpoint.weight_index import INDEX, SINGLE, read_weight_map, require_inside
from megaskip.errors import CheckpointError

ADAPTER = "adapter_config.json"
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_UNFINISHED = (".aria2", ".crdownload", ".download", ".incomplete", ".part", ".partial", ".tmp")
"""What downloaders call a file until all of it has arrived."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_OF_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files that ranks saved apart; where there are any, transformers reads them and nothing else."""
OTHER_STATE = ("training_args", "optimizer", "scheduler", "rng_state")
"""Files that a Trainer leaves beside the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    name: str
    """As the file has it."""
    file: str
    """Relative to the model's folder, which may be another one on another machine."""
    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """All tensors of a model's folder."""

    tensors: Mapping[str, StoredTensor]
    """By their names in the files."""
    unread: tuple[str, ...]
    """Other weight files of the folder, which do not count."""


def read_stored_weights(folder: Path) -> StoredWeights:
    """Return what the weight files of a model's folder hold; reads their headers only.

    model.safetensors counts, or else the files that the index names. Raises CheckpointError for a
    folder without these, with both, with files that are missing, cut off, not downloaded, or
    outside of it, or whose index and files do not agree.
    """
    _require_small_files(folder)
    _require_no_adapter(folder)
    weight_map = _index_that_counts(folder)
    files = sorted(set(weight_map.values())) or [SINGLE]
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors_of(folder, file):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{folder}: {tensor.name} is in {tensors[tensor.name].file} and in {file}; "
                    "keep it in one of them"
                )
            tensors[tensor.name] = tensor
    _require_index_agrees(folder, weight_map, tensors)
    if not tensors:
        raise CheckpointError(f"{folder}: its weight files hold no tensors; download it again")
    return StoredWeights(tensors=tensors, unread=_unread(folder, set(files)))


def holds_weights(folder: Path) -> bool:
    """Return whether a model's folder has any file of weights, of whatever kind."""
    names = {file.name for file in folder.iterdir()}
    for suffix in _UNFINISHED:
        names = {name.removesuffix(suffix) for name in names}
    return INDEX in names or any(name.endswith(_WEIGHT_SUFFIXES) for name in names)


def weight_map_of(folder: Path) -> dict[str, str]:
    """Return the file name of each stored tensor of a model; empty when there are no safetensors.

    Raises CheckpointError as `read_stored_weights` does.
    """
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        return {}
    return {name: tensor.file for name, tensor in read_stored_weights(folder).tensors.items()}


def _index_that_counts(folder: Path) -> dict[str, str]:
    """Return the content of a folder's index; empty where model.safetensors is all there is."""
    has_index, has_single = (folder / INDEX).is_file(), (folder / SINGLE).is_file()
    if not has_index and not has_single:
        raise CheckpointError(_without_safetensors(folder))
    of_ranks = sorted(file.name for file in folder.iterdir() if _OF_RANKS.fullmatch(file.name))
    if of_ranks:
        raise CheckpointError(
            f"{folder} holds {of_ranks[0]} of a checkpoint by ranks beside a whole model; remove "
            "the one or the other"
        )
    if not has_index:
        return {}
    weight_map = read_weight_map(folder / INDEX)
    if has_single and set(weight_map.values()) == {SINGLE}:
        return weight_map
    if has_single:
        raise CheckpointError(
            f"{folder} holds both {SINGLE} and {INDEX} of other files: some programs read the one, "
            "some the other; remove the one that is out of date"
        )
    if not weight_map:
        raise CheckpointError(f"{folder / INDEX} names no tensor; download it again")
    if not isinstance(read_json(folder / INDEX).get("metadata"), dict):
        raise CheckpointError(
            f"{folder / INDEX} has no metadata, without which transformers does not read it; "
            'download it again, or add "metadata": {}'
        )
    return weight_map


def _tensors_of(folder: Path, file: str) -> list[StoredTensor]:
    require_inside(folder, file, named_by=f"{folder} has")
    path = folder / file
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, which {INDEX} names{_unfinished(folder)}; copy or download it"
        )
    if Path(f"{path}.aria2").is_file():
        raise CheckpointError(f"{path}.aria2 shows a download that did not finish; continue it")
    header, start = read_header(path)
    header.pop(METADATA, None)
    return [_stored(name, file, entry, start) for name, entry in header.items()]


def _stored(name: str, file: str, entry: Mapping[str, Any], start: int) -> StoredTensor:
    return StoredTensor(
        name=name,
        file=file,
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        offset=start + entry["data_offsets"][0],
    )


def _require_index_agrees(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / file} does not hold {name}, which {INDEX} says; the index and the "
                "files are not of one model, download it again"
            )


def _require_small_files(folder: Path) -> None:
    """Raise CheckpointError when a config or tokenizer file was not downloaded."""
    try:
        files = [f for f in folder.iterdir() if f.suffix in _SMALL_SUFFIXES and f.is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None
    for file in sorted(files):
        require_no_pointer(file)


def _require_no_adapter(folder: Path) -> None:
    """Raise CheckpointError for an adapter: beside a whole model, too, for transformers would apply
    it on some machines (where peft is installed) and not on others."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds {ADAPTER}: an adapter such as LoRA's is no model of its own; merge it "
            "into its base (peft: merge_and_unload) and save that, or remove its files"
        )


def _without_safetensors(folder: Path) -> str:
    """Return what is wrong with a folder that has neither model.safetensors nor an index."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if any(name in _TORCH for name in names):
        return (
            f"{folder} holds no safetensors, only {next(n for n in names if n in _TORCH)}; load it "
            "with transformers and save_pretrained it once"
        )
    if shards:
        return (
            f"{folder} holds {len(shards)} shard(s) such as {shards[0]} and no {INDEX}; download "
            "the index, too"
        )
    others = [name for name in names if name.endswith(_WEIGHT_SUFFIXES)]
    if others:
        return (
            f"{folder} holds {', '.join(others[:3])}, but neither {SINGLE} nor {INDEX}, which "
            "transformers reads; save the model with save_pretrained"
        )
    return (
        f"{folder} holds no weights (neither {SINGLE} nor {INDEX}){_unfinished(folder)}; copy or "
        "download them"
    )


def _unfinished(folder: Path) -> str:
    """Return words for files of a download that did not finish; "" without any."""
    cache = folder / ".cache/huggingface/download"
    files = [*folder.iterdir(), *(cache.iterdir() if cache.is_dir() else ())]
    names = sorted(file.name for file in files if file.suffix in _UNFINISHED)
    return f" ({names[0]} is there: a download that did not finish)" if names else ""


def _unread(folder: Path, read: set[str]) -> tuple[str, ...]:
    """Return the weight files that lie in a folder and do not count."""
    names = {file.name for file in folder.iterdir() if file.is_file()} - read
    weights = {name for name in names if name.endswith(_WEIGHT_SUFFIXES)}
    return tuple(sorted(name for name in weights if not name.startswith(OTHER_STATE)))
