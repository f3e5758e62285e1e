"""Files of every kind as rows, each with its place. Knows no folders, and of formats only how to
tell one row from a list of rows."""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from megaskip.config.value_types import shown
from megaskip.data.fields import Place, parse_json
from megaskip.data.formats import fits_format
from megaskip.errors import DataError, first_line
from megaskip.extras import extra

TEXT_PIECE = 100_000
"""Characters of a .txt file that are tokenised at once: bounds the memory, not the meaning."""

ReadRow = tuple[Place, Mapping[str, Any] | DataError]
"""A row, or why it cannot be read; the rows behind an unreadable one may still be good."""

_SAVED = ("state.json", "dataset_info.json")
"""Files of every folder that Dataset.save_to_disk has written."""

_LFS = b"version https://git-lfs"
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError)
"""What damaged compressed files raise besides OSError."""


def is_readable(path: Path) -> bool:
    """Return whether rows can be read from `path`: a file of a known kind, compressed or not, or
    a folder of Dataset.save_to_disk."""
    return is_saved_dataset(path) if path.is_dir() else kind_of(path.name) in _READERS


def is_saved_dataset(folder: Path) -> bool:
    """Return whether Dataset.save_to_disk has written the folder."""
    return all((folder / name).is_file() for name in _SAVED)


def kind_of(name: str) -> str:
    """Return the suffix of a file's name, in lower case, without that of a compression."""
    path = Path(name.lower())
    if path.suffix in _COMPRESSED and Path(path.stem).suffix in _COMPRESSIBLE:
        return Path(path.stem).suffix
    return path.suffix


def known_kinds() -> str:
    """Return what can be read, for error texts."""
    return f"{', '.join(_READERS)} ({', '.join(_COMPRESSIBLE)} also with {', '.join(_COMPRESSED)})"


def read_path(path: Path) -> Iterator[ReadRow]:
    """Yield the rows of a file or saved data set, errors among them, and go on behind each."""
    try:
        if path.is_dir():
            yield from _read_saved(path)
            return
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise DataError(f"{path}: a Git LFS pointer, not the file itself. Run git lfs pull")
        yield from _READERS[kind_of(path.name)](path)
    except DataError as error:
        yield Place(file=str(path)), error
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror or error})"
        yield Place(file=str(path)), DataError(reason)
    except _DAMAGED as error:
        reason = f"{path}: the compressed file is damaged or not complete ({first_line(error)})"
        yield Place(file=str(path)), DataError(reason)


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading what it holds, decompressed."""
    opener = _COMPRESSED.get(path.suffix.lower())
    file: IO[bytes] = path.open("rb") if opener is None else opener(path)
    return file


def _open_zstd(path: Path) -> io.BufferedReader:
    with extra("train"):
        import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _read_text(path: Path) -> str:
    try:
        with _open(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file to UTF-8") from error


def _read_json(path: Path) -> Iterator[ReadRow]:
    """Read a .json file: an array of rows, an object that holds one, or one row per line."""
    text = _read_text(path)
    start = text[len(text) - len(text.lstrip()) :][:1]
    if start not in ("[", "{"):
        yield from _read_json_lines(path)
        return
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().splitlines()[0].rstrip()
        if start == "[" or first.endswith(("{", "[", ",")):  # one value over several lines
            raise _bad_json(path, error.lineno, error) from error
        yield from _read_json_lines(path)
        return
    for number, row in enumerate(_rows_of(value, path), start=1):
        place = Place(file=str(path), number=number, unit="row")
        yield place, _checked_row(row, place)


def _rows_of(value: Any, path: Path) -> list[Any]:
    """Return the rows of a JSON value: its entries, those of the only list in it, or itself.

    What stands beside such a list belongs to every row, so that it is used or named.
    """
    if isinstance(value, list):
        return value
    lists = [key for key, rows in value.items() if _is_list_of_objects(rows)]
    if not lists or fits_format(value):
        return [value]
    if len(lists) > 1:
        raise DataError(
            f"{path}: lists of rows under {' and '.join(map(shown, lists))}; expected one list. "
            "Write the one that you mean to a file of its own"
        )
    beside = {key: other for key, other in value.items() if key != lists[0]}
    return [{**beside, **row} for row in value[lists[0]]]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def _read_json_lines(path: Path) -> Iterator[ReadRow]:
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            place = Place(file=str(path), number=number)
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line := line.rstrip():  # the column of an error counts from this line's start
                    yield place, _checked_row(parse_json(line), place)
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


def _read_table(path: Path) -> Iterator[ReadRow]:
    """Read a table with a header: values separated by commas, or by tabs in a .tsv file."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the library's 128 KiB
    delimiter = "\t" if kind_of(path.name) == ".tsv" else ","
    line = 0
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(table, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}, line 1: two columns have the same name: {header}")
            line = table.line_num
            for cells in table:
                place = Place(file=str(path), number=line + 1)
                line = table.line_num
                if cells:
                    yield place, _table_row(header, cells, place)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}). Convert the file to UTF-8") from error
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line + 1}: not a row of a table ({error}). Put a text that holds "
            'quotes or line breaks in quotes ("), and write each quote in it twice'
        ) from error


def _table_row(header: list[str], cells: list[str], place: Place) -> Mapping[str, Any] | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError(
        f"{place}: {len(cells)} cells, but {len(header)} columns in the first line. Put a text "
        'that holds the separator in quotes (")'
    )


def _read_plain(path: Path) -> Iterator[ReadRow]:
    """Cut a text file into documents of up to TEXT_PIECE characters, best at empty lines. Its line
    ends are read as Python reads them: those of Windows are no other text."""
    text = _read_text(path).replace("\r\n", "\n").replace("\r", "\n")
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


def _read_columns(path: Path) -> Iterator[ReadRow]:
    """Read a .parquet or .arrow file."""
    with extra("train"):
        import datasets
        from pyarrow.lib import ArrowException

    kind = kind_of(path.name)[1:]
    # A name is a pattern to the library. streaming=True reads the file itself; False would first
    # copy it into the cache.
    name = glob.escape(str(path.absolute()))
    try:
        rows = datasets.load_dataset(kind, data_files=name, split="train", streaming=True)
        yield from number_rows(rows, str(path))
    except (ValueError, OSError, ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not a readable {kind} file ({first_line(error)})") from error


def _read_saved(folder: Path) -> Iterator[ReadRow]:
    with extra("train"):
        import datasets

    try:
        rows = datasets.load_from_disk(str(folder.absolute()))
        yield from number_rows(rows.to_iterable_dataset(), str(folder))
    except (ValueError, OSError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{folder}: not a readable folder of Dataset.save_to_disk ({first_line(error)})"
        ) from error


def number_rows(rows: Any, name: str) -> Iterator[ReadRow]:
    """Yield the rows of an iterable data set; media stay as they are stored, not opened."""
    # Without features nothing is decoded, and there is nothing to switch off.
    undecoded = rows if rows.features is None else rows.decode(False)
    for number, row in enumerate(undecoded, start=1):
        yield Place(file=name, number=number, unit="row"), row


_READERS: dict[str, Callable[[Path], Iterator[ReadRow]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_plain,
    ".parquet": _read_columns,
    ".arrow": _read_columns,
}
_COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}
