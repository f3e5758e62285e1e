"""Which file of a model's folder holds which tensor. The one reader of weight indexes."""

from pathlib import Path

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.header import METADATA, read_header
from megaskip.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor of a model; empty when there are no safetensors."""
    return {name: folder / file for name, file in weight_map_of(folder).items()}


def weight_map_of(folder: Path) -> dict[str, str]:
    """Return the file name, as the index has it, of each stored tensor of a model; empty when there
    are no safetensors.

    Raises CheckpointError when the index or the only file is damaged.
    """
    if (folder / INDEX).is_file():
        return read_weight_map(folder / INDEX)
    if not (folder / SINGLE).is_file():
        return {}
    header, _ = read_header(folder / SINGLE)
    return dict.fromkeys(sorted(header.keys() - {METADATA}), SINGLE)


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor that an index lists; raises CheckpointError when it is
    damaged."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: expected names and their files in weight_map")
    return weight_map


def require_whole_shards(folder: Path) -> None:
    """Raise CheckpointError when a safetensors file of a model's folder is cut off or missing."""
    files = set(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        files |= {folder / name for name in read_weight_map(folder / INDEX).values()}
    for file in sorted(files):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, which {INDEX} names")
        read_header(file)
