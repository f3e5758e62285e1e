"""Tensors by name from the weight files of others: safetensors or torch, one file or shards.

Reads what is asked for, and runs no code that a file brings along.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from megaskip.checkpoint.stored_weights import OTHER_STATE
from megaskip.checkpoint.weight_index import SINGLE, read_weight_map
from megaskip.errors import CheckpointError, first_line

_SAFE = ".safetensors"
_TORCH = (".bin", ".pt", ".pth")
_WHOLE = (SINGLE, "pytorch_model.bin")
_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
)
"""What torch.load raises for files that are cut off, changed, or hold more than tensors."""


def read_tensors_named(
    source: Path, wanted: re.Pattern[str]
) -> tuple[list[str], dict[str, tuple[Path, Tensor]]]:
    """Return all tensor names of a folder or file, and (file, tensor) of those `wanted` matches
    whole.

    With an index only the shards that hold wanted tensors are opened. Raises CheckpointError when
    a file is missing, damaged or of an unknown kind, or when two files hold the same name.
    """
    index = _index_of(source)
    if index is not None:
        return _read_indexed(index, wanted)
    files = [source] if source.is_file() else _weight_files(source)
    names: dict[str, Path] = {}
    tensors: dict[str, tuple[Path, Tensor]] = {}
    for file in files:
        stored, read = _read_file(file, wanted)
        for name in stored:
            if name in names:
                raise CheckpointError(
                    f"{source}: {name} is in {names[name].name} and in {file.name}; name one file "
                    "with --source"
                )
            names[name] = file
        tensors.update({name: (file, tensor) for name, tensor in read.items()})
    return list(names), tensors


def _index_of(source: Path) -> Path | None:
    for suffix in (_SAFE, *_TORCH) if source.is_dir() else ():
        for index in sorted(source.glob(f"*{suffix}.index.json")):
            return index
    return None


def _read_indexed(
    index: Path, wanted: re.Pattern[str]
) -> tuple[list[str], dict[str, tuple[Path, Tensor]]]:
    shards = read_weight_map(index)
    matching = {
        name: index.parent / file for name, file in shards.items() if wanted.fullmatch(name)
    }
    tensors: dict[str, tuple[Path, Tensor]] = {}
    for file in sorted(set(matching.values())):
        if not file.is_file():
            raise CheckpointError(f"{file} does not exist, but {index.name} names it")
        _, read = _read_file(file, wanted)
        tensors.update({name: (file, tensor) for name, tensor in read.items()})
    lacking = sorted(matching.keys() - tensors.keys())
    if lacking:
        raise CheckpointError(
            f"{matching[lacking[0]]} lacks {lacking[0]}, which {index.name} names"
        )
    return list(shards), tensors


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder without an index: the whole model's, or all there are."""
    for name in _WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None
    safe = [file for file in files if file.suffix == _SAFE]
    others = [
        file for file in files if file.suffix in _TORCH and not file.name.startswith(OTHER_STATE)
    ]
    if not safe and not others:
        raise CheckpointError(
            f"{folder}: no weights in this folder, expected *{_SAFE} or *{', *'.join(_TORCH)}"
        )
    return safe or others


def _read_file(file: Path, wanted: re.Pattern[str]) -> tuple[list[str], dict[str, Tensor]]:
    if file.suffix == _SAFE:
        return _read_safetensors(file, wanted)
    if file.suffix in _TORCH:
        content = _read_torch(file)
        return list(content), {n: tensor for n, tensor in content.items() if wanted.fullmatch(n)}
    raise CheckpointError(f"{file}: expected a file *{_SAFE} or *{', *'.join(_TORCH)}")


def _read_safetensors(file: Path, wanted: re.Pattern[str]) -> tuple[list[str], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            return names, {n: handle.get_tensor(n) for n in names if wanted.fullmatch(n)}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def _read_torch(file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file by torch.save; only plain tensors are unpickled."""
    try:
        content = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except _DAMAGE as error:
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({first_line(error)}); save its state dict as "
            "safetensors"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: expected a dict of tensors by name, found {type(content).__name__}"
        )
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
