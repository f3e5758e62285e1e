"""Data of the tasks in this folder: JSON lines on disk. Called by their YAML files."""

import itertools
import json
from pathlib import Path
from typing import Any

from megaskip.errors import DataError
from megaskip.extras import extra

with extra("eval"):
    from datasets import Dataset

_HERE = Path(__file__).parent


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


_TEXT = (_is_text, "a text")
_EXPECTED = {
    "query": _TEXT,
    "sentence_good": _TEXT,
    "sentence_bad": _TEXT,
    "choices": (_are_texts, "a list of texts"),
    "gold": (lambda value: type(value) is int, "the number of a choice, from 0"),
}


def bundled(file: str, **_: Any) -> dict[str, Dataset]:
    """Return the rows of a file in this folder as the split "test"."""
    return {"test": Dataset.from_list(_rows(_HERE / file, ()))}


def local(
    files: str, fields: list[str], data_dir: str | None = None, **_: Any
) -> dict[str, Dataset]:
    """Return the rows of a user's files as the split "test".

    `files` is a pattern under --data_dir. Rows of several files take turns, so that --limit has
    some of each.
    """
    if data_dir is None:
        raise DataError(f"this task reads {files} of your own: say where with --data_dir DIR")
    found = sorted(Path(data_dir).glob(files))
    if not found:
        raise DataError(f"--data_dir {data_dir}: there is no {files} in it")
    turns = itertools.zip_longest(*(_rows(file, fields) for file in found))
    return {"test": Dataset.from_list([row for turn in turns for row in turn if row is not None])}


def _rows(file: Path, fields: Any) -> list[dict[str, Any]]:
    """Return the rows of a file, of each the `fields` (all without any)."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not valid JSON ({error})") from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise DataError(f"{file}, line {number}: lacks {', '.join(missing)}")
        for name, (is_right, expected) in _EXPECTED.items():
            if name in fields and not is_right(row[name]):
                raise DataError(
                    f"{file}, line {number}: {name} is {row[name]!r}, expected {expected}"
                )
        rows.append({name: row[name] for name in fields} if fields else row)
    if not rows:
        raise DataError(f"{file} has no rows")
    return rows
