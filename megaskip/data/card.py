"""What the README.md of a hub data set says of its files: subsets, splits, patterns. Reads no
rows."""

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megaskip.config.value_types import shown
from megaskip.errors import DataError

_FENCE = "---"
_TRAIN = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subset:
    """One entry of `configs` in the README.md: the files of each of its splits."""

    name: str
    split_of: dict[Path, str] = field(default_factory=dict)
    """File -> name of its split."""
    is_default: bool = False


def subsets_of(folder: Path) -> list[Subset]:
    """Return the subsets that the README.md of a folder declares; none where it declares nothing.

    Raises DataError where the head of the README.md cannot be read.
    """
    path = folder / "README.md"
    head = _head(path)
    try:
        card = yaml.safe_load(head)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates, of endless lists
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: its head is not YAML ({reason}). Mend it, or name files"
        ) from None
    entries = card.get("configs") if isinstance(card, dict) else None
    if not isinstance(entries, list | None):
        raise _unusable(path, "configs", entries, "a list of subsets")
    return [_subset(folder, entry) for entry in entries or [] if isinstance(entry, dict)]


def choose_subset(folder: Path, subsets: list[Subset]) -> Subset:
    """Return the only subset of a folder, or its default; raises DataError where there is none."""
    defaults = [subset for subset in subsets if subset.is_default] or [
        subset for subset in subsets if subset.name == "default"
    ]
    if len(subsets) == 1 or defaults:
        return (defaults or subsets)[0]
    names = ", ".join(str(folder / subset.name) for subset in subsets)
    raise DataError(f"{folder}: its README.md has several subsets; name one of {names}")


def _head(path: Path) -> str:
    """Return the YAML between the first two lines of ---, "" where a README.md has none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != _FENCE or _FENCE not in lines[1:]:
        return ""
    return "\n".join(lines[1 : lines.index(_FENCE, 1)])


def _subset(folder: Path, entry: dict[str, Any]) -> Subset:
    name, root = str(entry.get("config_name", "default")), str(entry.get("data_dir") or "")
    split_of: dict[Path, str] = {}
    for split, pattern in _patterns(entry.get("data_files") or "**"):
        if not isinstance(pattern, str):
            expected = "a path or a pattern of files"
            raise _unusable(folder / "README.md", f"data_files of {name}", pattern, expected)
        for match in sorted(glob.glob(str(Path(root, pattern)), root_dir=folder, recursive=True)):
            split_of.setdefault(folder / match, split)
    return Subset(name=name, split_of=split_of, is_default=bool(entry.get("default")))


def _unusable(path: Path, key: str, value: Any, expected: str) -> DataError:
    return DataError(
        f"{path}: {key} in its head is {shown(value)}, expected {expected}. Mend it, or name files"
    )


def _patterns(value: Any) -> list[tuple[str, Any]]:
    """Return (split, pattern) of data_files in any of the shapes that the hub knows: a pattern, a
    list of them, {split: patterns}, or a list of {split, path}."""
    if isinstance(value, dict):
        return [(str(split), path) for split in value for path in _listed(value[split])]
    pairs = []
    for item in _listed(value):
        if isinstance(item, dict):
            split = str(item.get("split", _TRAIN))
            pairs += [(split, path) for path in _listed(item.get("path", []))]
        else:
            pairs.append((_TRAIN, item))
    return pairs


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
