"""The header of a safetensors file: what the file holds, and whether all of it is there.

A file that was cut off is noticed by its size, at any size of the model in no time.
"""

import json
import math
from pathlib import Path
from typing import Any

from megaskip.errors import CheckpointError

METADATA = "__metadata__"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")
_LONGEST = 100_000_000
"""Bytes of a header: what the safetensors library reads at most."""
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
"""Of an element, by the type's name in the header; other types are not checked."""


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return (header, where the data begin) of a whole safetensors file.

    Raises CheckpointError when the file is cut off or is none.
    """
    try:
        actual = file.stat().st_size
        with open(file, "rb") as reader:
            begin = reader.read(64)
            _require_binary(file, begin)
            size = int.from_bytes(begin[:8], "little")
            reader.seek(8)
            text = reader.read(min(size, actual))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    if size > _LONGEST:
        raise CheckpointError(f"{file} is damaged: it is no safetensors file; download it again")
    if len(text) < size:
        raise _cut_off(file, actual, "its header alone", 8 + size)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != METADATA}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        is_cut_off = actual < 8 + size + end
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: its header cannot be read ({error})") from None
    if is_cut_off:
        raise _cut_off(file, actual, "what its header lists", 8 + size + end)
    _require_consistent(file, entries, actual - 8 - size)
    return header, 8 + size


def require_no_pointer(file: Path) -> None:
    """Raise CheckpointError when a file is a Git LFS pointer or a web page in its place."""
    try:
        with open(file, "rb") as reader:
            _require_binary(file, reader.read(64), empty=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None


def _require_binary(file: Path, begin: bytes, *, empty: bool = False) -> None:
    """Raise CheckpointError when a file begins as what a download leaves in the place of it."""
    if not begin and not empty:
        raise CheckpointError(f"{file} is empty; copy or download it again")
    if begin.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
            "or download the model again"
        )
    if begin.lstrip().lower().startswith(_WEB_PAGES):
        raise CheckpointError(f"{file} is a web page, not the file itself; download it again")


def _require_consistent(file: Path, entries: dict[str, Any], data: int) -> None:
    """Raise CheckpointError unless the tensors fill the `data` bytes, one after the other."""
    try:
        spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
        position = 0
        for begin, end, name in spans:
            elements = math.prod(entries[name]["shape"])
            bits = _BITS.get(entries[name]["dtype"])
            size_fits = bits is None or elements * bits == 8 * (end - begin)
            if begin != position or end < begin or not size_fits:
                raise ValueError(f"the bytes of {name} are not those of its type and shape")
            position = end
        if position != data:
            raise ValueError(f"its tensors take {position:,} bytes, the file has {data:,}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; copy or download it again") from None


def _cut_off(file: Path, actual: int, what: str, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged: it has {actual:,} bytes and {what} takes {expected:,}; copy or "
        "download it again"
    )
