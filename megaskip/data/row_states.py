"""Hidden states of rows, computed once and read back: in memory, or in files that ranks and later
runs share. Knows rows by number and tensors, no model.

Shapes: T tokens of a row, D hidden.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaskip.config.value_types import shown
from megaskip.errors import DataError

_FLUSH_BYTES = 256 << 20
"""States written before they are marked as there, which waits for the disk."""
_META, _STATES, _CHECKSUMS = "meta.json", "states.bin", "checksums.bin"


class RowStates(Protocol):
    """The states of some rows of a data set."""

    dtype: torch.dtype
    """Of the states that are kept."""
    hidden_size: int
    identity: str
    """Equal on the ranks that read what the others write."""

    def present(self) -> NDArray[np.bool_]:
        """Return which rows are there."""
        ...

    def write(self, number: int, states: Tensor) -> None:
        """Keep the states [T, D] of a row; they may be on any device."""
        ...

    def flush(self) -> None:
        """Let all that was written be there, also after a crash."""
        ...

    def read(self, number: int) -> Tensor:
        """Return the states [T, D] of a row that is there, on the CPU."""
        ...


class StatesInMemory:
    """States that live as long as this process."""

    def __init__(self, rows: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.dtype, self.hidden_size = dtype, hidden_size
        self.identity = uuid.uuid4().hex
        self._rows = rows
        self._states: dict[int, Tensor] = {}

    def present(self) -> NDArray[np.bool_]:
        here = np.zeros(self._rows, dtype=np.bool_)
        here[list(self._states)] = True
        return here

    def write(self, number: int, states: Tensor) -> None:
        self._states[number] = torch.empty(states.shape, dtype=self.dtype).copy_(states)

    def flush(self) -> None:
        pass

    def read(self, number: int) -> Tensor:
        return self._states[number]


class StatesOnDisk:
    """States in a folder: one file with room for all rows, and a checksum for each that is there.

    Processes may write at the same time. A row counts as there once its checksum is written, which
    comes after its states: a killed process leaves nothing half.
    """

    def __init__(
        self, folder: Path, lengths: NDArray[np.int64], hidden_size: int, dtype: torch.dtype
    ) -> None:
        """Map the folder, which `make_folder` has made; raises DataError for one that is not for
        rows of these `lengths`."""
        self.dtype, self.hidden_size, self.folder = dtype, hidden_size, folder
        self._starts = _starts(lengths, hidden_size, dtype)
        self.identity = self._check(len(lengths))
        self._files = {name: os.open(folder / name, os.O_RDWR) for name in (_STATES, _CHECKSUMS)}
        # numpy cannot map an empty file.
        self._states = np.memmap(folder / _STATES, np.uint8, "r") if self._starts[-1] else b""
        self._checksums = np.memmap(folder / _CHECKSUMS, "<u4", "r")
        self._written: dict[int, int] = {}
        self._unflushed = 0

    def present(self) -> NDArray[np.bool_]:
        return self._checksums != 0

    def write(self, number: int, states: Tensor) -> None:
        content = _bytes_of(states.detach().to("cpu", self.dtype).contiguous())
        start, end = self._starts[number], self._starts[number + 1]
        assert len(content) == end - start, f"row {number} has {end - start} bytes of states"
        with _disk_errors(self.folder):
            _write_all(self._files[_STATES], content, start)
        self._written[number] = _checksum(content)
        self._unflushed += len(content)
        if self._unflushed >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        with _disk_errors(self.folder):
            os.fsync(self._files[_STATES])
            for number, checksum in self._written.items():
                _write_all(self._files[_CHECKSUMS], checksum.to_bytes(4, "little"), 4 * number)
        self._written, self._unflushed = {}, 0

    def read(self, number: int) -> Tensor:
        content = self._states[self._starts[number] : self._starts[number + 1]]
        if _checksum(content) != self._checksums[number]:
            raise DataError(
                f"{self.folder}: the cached states of row {number} are damaged. Delete the folder"
            )
        # torch warns of arrays that cannot be written to, and cannot be told that nobody does.
        states = torch.frombuffer(bytearray(content), dtype=self.dtype)
        return states.view(-1, self.hidden_size)

    def _check(self, rows: int) -> str:
        """Return the identity of the folder."""
        expected = {_STATES: self._starts[-1], _CHECKSUMS: 4 * rows}
        try:
            meta = json.loads((self.folder / _META).read_text(encoding="utf-8"))
            for name, size in expected.items():
                if (self.folder / name).stat().st_size != size:
                    raise ValueError(f"{name} has not {size} bytes")
            return str(meta["identity"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(
                f"{self.folder}: the cached states are damaged ({shown(str(error))}). Delete the "
                "folder"
            ) from None


def make_folder(
    folder: Path,
    lengths: NDArray[np.int64],
    hidden_size: int,
    dtype: torch.dtype,
    description: Mapping[str, Any],
) -> None:
    """Make the folder of StatesOnDisk, without any row, unless it is there; `description` is for
    people. Raises DataError when it cannot be written."""
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            return
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        draft.chmod(0o755)
        try:
            sizes = {_STATES: _starts(lengths, hidden_size, dtype)[-1]}
            sizes[_CHECKSUMS] = 4 * len(lengths)
            for name, size in sizes.items():
                with (draft / name).open("wb") as file:
                    file.truncate(size)  # room that takes no disk until it is written
            meta = {"identity": uuid.uuid4().hex, "rows": len(lengths), **description}
            (draft / _META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
            try:
                os.replace(draft, folder)
            except OSError:
                if not (folder / _META).is_file():  # another process was first
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def bytes_of_rows(
    lengths: NDArray[np.int64], missing: NDArray[np.bool_], hidden_size: int, dtype: torch.dtype
) -> int:
    """Return the bytes of the states of the rows that are `missing`."""
    return int(lengths[missing].sum()) * hidden_size * dtype.itemsize


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says of a folder into one line."""
    try:
        yield
    except OSError as error:
        full = "; what is written so far is used again" if error.errno == errno.ENOSPC else ""
        raise DataError(
            f"--cache_prefix {folder.parent}: states cannot be kept there "
            f"({error.strerror or error}){full}"
        ) from None


def _starts(lengths: NDArray[np.int64], hidden_size: int, dtype: torch.dtype) -> list[int]:
    """Return where the states of each row begin, and where those of the last one end, in bytes."""
    sizes = lengths * (hidden_size * dtype.itemsize)
    return [0, *np.cumsum(sizes).tolist()]


def _bytes_of(states: Tensor) -> memoryview:
    return states.view(torch.uint8).numpy().data.cast("B")


def _checksum(content: Any) -> int:
    """Return a number of 32 bits that is never 0, which stands for a row that is not there."""
    return zlib.crc32(content) or 1


def _write_all(file: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
