"""Where rows come from: files, folders and the hub, each row with its place. Knows no formats."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megaskip.config.checks import closest
from megaskip.data.fields import Place
from megaskip.errors import DataError
from megaskip.extras import extra

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
TEXT_PIECE = 100_000
"""Characters of a .txt file that are tokenised at once: bounds the memory, not the meaning."""

RawRow = tuple[Place, Mapping[str, Any]]

ReadRow = tuple[Place, Mapping[str, Any] | DataError]
"""A row, or why it cannot be read; the rows behind an unreadable one may still be good."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of --data: what to read, and how often a row of it is seen."""

    name: str
    """As given, without the weight."""
    weight: float
    """Epochs multiplier: 2.5 shows each row twice and half of them three times; 0.3 is a sample."""
    files: tuple[Path, ...] = ()
    """Local files in reading order; empty for a hub data set."""
    streaming: bool = False
    """Read a hub data set without downloading it first."""


def find_source(entry: str, *, streaming: bool = False) -> Source:
    """Resolve `PATH[:weight]`; the tail is a weight if it is a number and no such file exists."""
    name, weight = _split_weight(entry)
    path = Path(name).expanduser()
    if path.is_file():
        return Source(name=name, weight=weight, files=(_known_kind(path),))
    if path.is_dir():
        return Source(name=name, weight=weight, files=_files_in(path))
    if _looks_like_hub(name):
        return Source(name=name, weight=weight, streaming=streaming)
    raise DataError(f"data {name!r}: no such file or folder{_nearby(path)}")


def read_rows(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a source in file order. Bad JSON or an unreadable file is a DataError."""
    for place, row in read_every_row(source):
        if isinstance(row, DataError):
            raise row
        yield place, row


def read_every_row(source: Source) -> Iterator[ReadRow]:
    """Yield the rows of a source in file order, errors among them, and go on behind each error."""
    if not source.files:
        yield from _read_hub(source)
    for path in source.files:
        try:
            yield from _READERS[path.suffix.lower()](path)
        except DataError as error:
            yield Place(file=str(path)), error
        except OSError as error:
            reason = f"{path}: cannot be read ({error.strerror or error})"
            yield Place(file=str(path)), DataError(reason)


def files_left_out(source: Source) -> list[str]:
    """Return the files in the folder of a source that are not read; nothing for other sources."""
    folder = Path(source.name).expanduser()
    if not source.files or not folder.is_dir():
        return []
    inside = {path for path in folder.rglob("*") if path.is_file()} - set(source.files)
    return sorted(str(path.relative_to(folder)) for path in inside)


def _split_weight(entry: str) -> tuple[str, float]:
    name, colon, tail = entry.rpartition(":")
    if not colon or not _NUMBER.fullmatch(tail) or Path(entry).exists():
        return entry, 1.0
    weight = float(tail)
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"data {entry!r}: the weight {tail} must be a number above 0, such as 0.5")
    return name, weight


def _known_kind(path: Path) -> Path:
    if path.suffix.lower() in SUFFIXES:
        return path
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}; expected one of {', '.join(SUFFIXES)}. "
        "Convert or unpack it"
    )


def _files_in(folder: Path) -> tuple[Path, ...]:
    inside = sorted(folder.rglob("*"))
    files = tuple(p for p in inside if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"{folder}: the folder holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _looks_like_hub(name: str) -> bool:
    if not _HUB_NAME.fullmatch(name) or name[0] in "./" or name.lower().endswith(SUFFIXES):
        return False
    return not Path(name.split("/")[0]).exists()


def _nearby(path: Path) -> str:
    """Say what the nearest existing folder holds instead."""
    folder = path.parent
    if not folder.is_dir():
        existing = next(p for p in folder.parents if p.is_dir())
        return f"; the folder {folder} does not exist (but {existing.resolve()} does)"
    names = [p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in SUFFIXES]
    near = closest(path.name, names, cutoff=0.6)
    if near is not None:
        return f"; did you mean {str(folder / near)!r}?"
    shown = ", ".join(sorted(names)[:8]) or "no data files"
    return f" in {folder.resolve()}, which holds {shown}"


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file to UTF-8") from error


def _read_json(path: Path) -> Iterator[ReadRow]:
    """Read a .json file, which holds an array of rows or one row per line."""
    text = _read_text(path)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad_json(path, error.lineno, error) from error
    for number, row in enumerate(rows, start=1):
        place = Place(file=str(path), number=number, unit="row")
        yield place, _checked_row(row, place)


def _read_json_lines(path: Path) -> Iterator[ReadRow]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = Place(file=str(path), number=number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line := line.rstrip():  # the column of an error counts from this line's start
                    yield place, _checked_row(json.loads(line), place)
            except UnicodeDecodeError as error:
                yield place, DataError(f"{place}: not UTF-8 text ({error}). Convert it")
            except json.JSONDecodeError as error:
                yield place, _bad_json(path, number, error)


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg})")


def _checked_row(row: Any, place: Place) -> Mapping[str, Any] | DataError:
    if isinstance(row, Mapping):
        return row
    return DataError(f"{place}: expected an object {{...}}, found {json.dumps(row)[:60]}")


def _read_plain(path: Path) -> Iterator[ReadRow]:
    """Cut a text file into documents of up to TEXT_PIECE characters, best at empty lines."""
    text = _read_text(path)
    start, line = 0, 1
    while start < len(text):
        end = _end_of_piece(text, start)
        piece = text[start:end]
        if piece.strip():
            yield Place(file=str(path), number=line), {"text": piece}
        start, line = end, line + piece.count("\n")


def _end_of_piece(text: str, start: int) -> int:
    limit = start + TEXT_PIECE
    if limit >= len(text):
        return len(text)
    for border in ("\n\n", "\n", " "):
        if (position := text.rfind(border, start + TEXT_PIECE // 2, limit)) >= 0:
            return position + len(border)
    return limit


def _read_parquet(path: Path) -> Iterator[ReadRow]:
    with extra("train"):
        import datasets

    # streaming=True reads the file itself; False would first copy it into the datasets cache.
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Place(file=str(path), number=number, unit="row"), row
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def _read_hub(source: Source) -> Iterator[ReadRow]:
    rows = load_hub(source)
    for number, row in enumerate(rows, start=1):
        yield Place(file=source.name, number=number, unit="row"), row


def load_hub(source: Source) -> Any:
    """Return the train split of a hub data set `org/name` or `org/name/subset`."""
    with extra("train"):
        import datasets

    parts = source.name.split("/")
    subset = parts[2] if len(parts) == 3 else None
    try:
        return datasets.load_dataset(
            "/".join(parts[:2]), subset, split="train", streaming=source.streaming
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data {source.name!r}: no such local file, and the hub did not give its train split "
            f"({_first_line(error)}). Check the name, or download it and pass the files"
        ) from error


def _first_line(error: Exception) -> str:
    return next(islice(str(error).splitlines(), 1), type(error).__name__)


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_plain,
}
