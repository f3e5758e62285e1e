"""The header of a safetensors file: what the file holds, and whether all of it is there.

A file that was cut off is noticed by its size, at any size of the model in no time.
"""

import json
from pathlib import Path
from typing import Any

from megaskip.errors import CheckpointError

METADATA = "__metadata__"


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Return (header, where the data begin) of a whole safetensors file.

    Raises CheckpointError when the file is cut off or is none.
    """
    try:
        actual = file.stat().st_size
        with open(file, "rb") as reader:
            size = int.from_bytes(reader.read(8), "little")
            text = reader.read(min(size, actual))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from None
    if len(text) < size:
        raise _cut_off(file, actual, "its header alone", 8 + size)
    try:
        header = json.loads(text)
        entries = [entry for name, entry in header.items() if name != METADATA]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: its header cannot be read ({error})") from None
    if actual < 8 + size + end:
        raise _cut_off(file, actual, "what its header lists", 8 + size + end)
    return header, 8 + size


def _cut_off(file: Path, actual: int, what: str, expected: int) -> CheckpointError:
    return CheckpointError(
        f"{file} is damaged: it has {actual:,} bytes and {what} takes {expected:,}; copy or "
        "download it again"
    )
