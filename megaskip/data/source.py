"""Where rows come from: files, folders, patterns and the hub. Knows no formats."""

import glob
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.config.checks import closest
from megaskip.config.value_types import shown
from megaskip.data.folder import (
    Choice,
    LeftOut,
    choose_by_pattern,
    choose_in_folder,
    choose_in_subset,
)
from megaskip.data.readers import (
    ReadRow,
    is_readable,
    known_kinds,
    number_rows,
    read_path,
)
from megaskip.errors import DataError, first_line
from megaskip.extras import extra

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)
_NO_SPLIT = re.compile("(Unknown|Bad) split")
"""What the datasets library says of a split that a data set does not have."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of --data: what to read, and how often a row of it is seen."""

    name: str
    """As given, without the weight."""
    weight: float
    """Epochs multiplier: 2.5 shows each row twice and half of them three times; 0.3 is a sample."""
    files: tuple[Path, ...] = ()
    """Local files, and folders of Dataset.save_to_disk, in reading order; empty for a hub data
    set."""
    left_out: tuple[LeftOut, ...] = ()
    """What is in the folder, or fits the pattern, and is not read."""
    streaming: bool = False
    """Read a hub data set without downloading it first."""
    held_out: bool = False
    """Of --eval_data: a held-out split of a hub data set is read."""


def find_source(entry: str, *, streaming: bool = False, held_out: bool = False) -> Source:
    """Resolve `PATH[:weight]`; the tail is a weight if it is a number and no such file exists.

    A path that exists is taken as it is, brackets and all; else * ? [...] make it a pattern.
    `held_out` reads the held-out splits of a folder instead of its training split.
    """
    try:
        name, weight = _split_weight(entry)
        if not name.strip():  # which would be the folder that the command was started in
            raise DataError(f"data {entry!r} names no file, folder or data set; give its path")
        choice = _find_files(name, held_out=held_out)
    except OSError as error:  # no name that a file could have
        raise DataError(f"data {shown(entry)}: {error.strerror or error}") from None
    if choice is not None:
        return Source(name=name, weight=weight, files=choice.files, left_out=choice.left_out)
    if _looks_like_hub(name):
        return Source(name=name, weight=weight, streaming=streaming, held_out=held_out)
    raise DataError(f"data {name!r}: no such file or folder{_nearby(Path(name).expanduser())}")


def read_every_row(source: Source) -> Iterator[ReadRow]:
    """Yield the rows of a source in file order, errors among them, and go on behind each error."""
    if not source.files:
        yield from _read_hub(source)
    for path in source.files:
        yield from read_path(path)


def _find_files(name: str, *, held_out: bool) -> Choice | None:
    """Return the files that a name stands for; None where there are none."""
    path = Path(name).expanduser()
    if path.is_file():
        return Choice(files=(_known_kind(path),))
    if path.is_dir():
        return choose_in_folder(path, held_out=held_out)
    subset = choose_in_subset(path, held_out=held_out)
    if subset is not None or not glob.has_magic(name):
        return subset
    return choose_by_pattern(str(path), held_out=held_out)


def _split_weight(entry: str) -> tuple[str, float]:
    name, colon, tail = entry.rpartition(":")
    if not colon or not _NUMBER.fullmatch(tail) or Path(entry).exists():
        return entry, 1.0
    weight = float(tail)
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"data {entry!r}: the weight {tail} must be a number above 0, such as 0.5")
    return name, weight


def _known_kind(path: Path) -> Path:
    if is_readable(path):
        return path
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}; expected one of {known_kinds()}. "
        "Convert or unpack it"
    )


def _looks_like_hub(name: str) -> bool:
    if not _HUB_NAME.fullmatch(name) or name[0] in "./" or is_readable(Path(name)):
        return False
    return not Path(name.split("/")[0]).exists()


def _nearby(path: Path) -> str:
    """Say what the nearest existing folder holds instead."""
    folder = path.parent
    if not folder.is_dir():
        existing = next(p for p in folder.parents if p.is_dir())
        return f"; the folder {folder} does not exist (but {existing.resolve()} does)"
    names = [p.name for p in folder.iterdir() if p.is_dir() or is_readable(p)]
    near = closest(path.name, names, cutoff=0.6)
    if near is not None:
        return f"; did you mean {str(folder / near)!r}?"
    shown = ", ".join(sorted(names)[:8]) or "no data files"
    return f" in {folder.resolve()}, which holds {shown}"


def _read_hub(source: Source) -> Iterator[ReadRow]:
    rows = load_hub(source)
    name = f"{source.name} ({rows.split} split)" if source.held_out else source.name
    yield from number_rows(rows if source.streaming else rows.to_iterable_dataset(), name)


def load_hub(source: Source) -> Any:
    """Return a split of a hub data set `org/name` or `org/name/subset`: train, or for held-out data
    the first of validation, test and train that it has."""
    with extra("train"):
        import datasets

    parts = source.name.split("/")
    subset = parts[2] if len(parts) == 3 else None
    splits = ("validation", "test", "train") if source.held_out else ("train",)
    for split in splits:
        try:
            return datasets.load_dataset(
                "/".join(parts[:2]), subset, split=split, streaming=source.streaming
            )
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            if split != splits[-1] and _NO_SPLIT.search(str(error)):
                continue
            raise DataError(
                f"data {source.name!r}: no such local file, and the hub did not give its {split} "
                f"split ({first_line(error)}). Check the name, or download it and pass the files"
            ) from error
    raise AssertionError("the last split is returned or an error")
