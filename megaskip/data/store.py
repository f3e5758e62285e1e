"""Tokenised rows on disk: written once, mapped by every rank. Knows no tokenizer and no format."""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaskip.config.value_types import shown, wrong_types
from megaskip.data.columns import ColumnCounts
from megaskip.data.row import PackedRow, Row
from megaskip.data.stats import DataStats, SourceStats
from megaskip.errors import DataError

_TYPES = {"input_ids": np.int32, "supervised": np.bool_, "starts": np.int64}
_TYPES |= {"prompt_length": np.int32, "source": np.int32}
_TYPES |= {"held_out": np.int64, "train": np.int64, "train_starts": np.int64}


@contextlib.contextmanager
def cache_errors(root: Path) -> Iterator[None]:
    """Turn what the system says of files in the cache `root` into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"--cache_dir {root}: tokenised data cannot be kept there ({error.strerror or error})"
        ) from None


def content_hash(row: Row) -> int:
    """Return 64 bits that are equal for rows with the same tokens."""
    digest = hashlib.blake2b(row.input_ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class RowWriter:
    """Appends rows to the files of a store: memory stays small, whatever the number of tokens."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = (folder / "input_ids.bin").open("wb")
        self._supervised = (folder / "supervised.bin").open("wb")
        self._starts = array("q", [0])
        self._prompt_length = array("i")
        self._source = array("i")
        self._hashes = array("Q")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error the folder goes away: what cannot be written of it does not matter.
        known = cache_errors(self._folder.parent) if error is None else contextlib.suppress(OSError)
        with known, self._ids, self._supervised:
            pass  # closes both
        if error is None:
            write_column(self._folder, "starts", self.starts)
            write_column(self._folder, "prompt_length", np.array(self._prompt_length))
            write_column(self._folder, "source", self.sources)

    def append(self, row: Row) -> None:
        with cache_errors(self._folder.parent):
            self._ids.write(row.input_ids.tobytes())
            self._supervised.write(row.supervised.tobytes())
        self._starts.append(self._starts[-1] + len(row))
        self._prompt_length.append(row.prompt_length)
        self._source.append(row.source)
        self._hashes.append(content_hash(row))

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.array(self._starts, dtype=np.int64)

    @property
    def sources(self) -> NDArray[np.int32]:
        return np.array(self._source, dtype=np.int32)

    @property
    def hashes(self) -> NDArray[np.uint64]:
        return np.array(self._hashes, dtype=np.uint64)


class StoredRows:
    """Rows by index or in order. Mapped read-only, so that ranks share the memory."""

    def __init__(
        self,
        columns: dict[str, NDArray[Any]],
        members: NDArray[np.int64],
        starts: NDArray[np.int64] | None,
    ) -> None:
        self._columns = columns
        self._members = members
        self._starts = starts

    def __len__(self) -> int:
        return len(self._members) if self._starts is None else len(self._starts) - 1

    def __iter__(self) -> Iterator[Row | PackedRow]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row | PackedRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        if self._starts is None:
            return self._row(int(self._members[index]))
        members = self._members[self._starts[index] : self._starts[index + 1]]
        return PackedRow(segments=tuple(self._row(int(member)) for member in members))

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each row."""
        lengths = np.diff(self._columns["starts"])[self._members]
        if self._starts is None or not len(lengths):
            return lengths
        return np.add.reduceat(lengths, self._starts[:-1])

    def largest_token(self) -> int:
        """Return the largest token id of the whole store, held-out rows too; 0 without any."""
        ids = self._columns["input_ids"]
        return int(ids.max()) if len(ids) else 0

    def _row(self, member: int) -> Row:
        start, end = self._columns["starts"][member], self._columns["starts"][member + 1]
        return Row(
            input_ids=self._columns["input_ids"][start:end],
            supervised=self._columns["supervised"][start:end],
            prompt_length=int(self._columns["prompt_length"][member]),
            source=int(self._columns["source"][member]),
        )


def write_plan(
    folder: Path,
    *,
    train: NDArray[np.int64],
    packs: Sequence[Sequence[int]] | None,
    held_out: NDArray[np.int64],
) -> None:
    """Write which rows make up an epoch, and, if packed, which go together."""
    if packs is not None:
        train = train[np.concatenate([np.array(members, dtype=np.int64) for members in packs])]
        write_column(folder, "train_starts", np.cumsum([0, *map(len, packs)]))
    write_column(folder, "train", train)
    write_column(folder, "held_out", held_out)


def write_column(folder: Path, name: str, values: NDArray[Any]) -> None:
    with cache_errors(folder.parent), (folder / f"{name}.bin").open("wb") as file:
        file.write(np.ascontiguousarray(values, dtype=_TYPES[name]).data)


def write_meta(folder: Path, stats: DataStats) -> None:
    """Write the stats and the size of every file: the last thing to be written."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.bin"))}
    counts = asdict(stats)
    if not stats.held_out_in_training:  # older versions read this file, too, and do not know it
        del counts["held_out_in_training"]
    meta = {"stats": counts, "sizes": sizes}
    path = folder / "meta.json"
    with cache_errors(folder.parent), path.open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def open_store(folder: Path) -> tuple[StoredRows, StoredRows, DataStats]:
    """Map a complete store: training rows, held-out rows, stats; raises DataError for a damaged
    one."""
    try:
        sizes, stats = _read_meta(folder)
        columns = {Path(name).stem: _map(folder / name, size) for name, size in sizes.items()}
        train = StoredRows(columns, columns["train"], columns.get("train_starts"))
        held_out = StoredRows(columns, columns["held_out"], None)
        _require_indices(columns)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder}: the cached data are damaged ({shown(str(error))}). Delete the folder"
        ) from None
    return train, held_out, stats


def _read_meta(folder: Path) -> tuple[dict[str, int], DataStats]:
    """Return the size of every file and the stats."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sources = tuple(
        SourceStats(columns=ColumnCounts(**source.pop("columns")), **source)
        for source in meta["stats"].pop("sources")
    )
    stats = DataStats(sources=sources, **meta["stats"])
    for counted in (*sources, *(source.columns for source in sources), stats):
        for problem in wrong_types(counted, ""):
            raise ValueError(problem)
    return meta["sizes"], stats


def _map(path: Path, size: int) -> NDArray[Any]:
    if not path.exists() or path.stat().st_size != size:
        raise DataError(f"{path}: the cached data are damaged. Delete the folder {path.parent}")
    kind = _TYPES[path.stem]
    # numpy cannot map an empty file.
    return np.memmap(path, dtype=kind, mode="r") if size else np.empty(0, kind)


def _require_indices(columns: dict[str, NDArray[Any]]) -> None:
    """Raise ValueError unless indices of rows, and of tokens, are those of rows and tokens that
    there are."""
    rows, starts = len(columns["source"]), columns["starts"]
    limits = [(columns[name], rows) for name in ("train", "held_out")]
    limits += [(starts, len(columns["input_ids"]) + 1)]
    if "train_starts" in columns:
        limits.append((columns["train_starts"], len(columns["train"]) + 1))
    for indices, limit in limits:
        if len(indices) and not 0 <= indices.min() <= indices.max() < limit:
            raise ValueError("an index lies beyond the data")
    if len(starts) != rows + 1:
        raise ValueError(f"{len(starts)} starts of {rows} rows")
