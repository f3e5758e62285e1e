"""safetensors files without some of their tensors.

Bytes are copied and nothing is decoded: any type passes, and a block of memory is enough.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megaskip.errors import CheckpointError, UnsupportedModelError

_METADATA = "__metadata__"
_BLOCK = 8 << 20
_ALIGNMENT = 8
_IN_LAYER = re.compile(r"(?P<stack>(?:.+?\.)?layers)\.(?P<layer>\d+)\.(?P<child>[^.]+)\..+")
_SUBLAYERS = {"attn": ("self_attn",), "mlp": ("mlp", "block_sparse_moe", "feed_forward")}
"""Names of sublayers in files, which may be older than those of the modules (mixtral)."""


def names_of_dropped(
    names: Iterable[str],
    dropped: Mapping[str, Sequence[int]],
    extra: Mapping[str, str] | None = None,
) -> set[str]:
    """Return the stored tensors of dropped sublayers: `dropped` has layers by attn or mlp.

    `extra` names one further child of the layer that goes with each. Raises UnsupportedModelError
    when the files do not say clearly which tensors these are.
    """
    stored: dict[tuple[int, str], set[str]] = {}
    stacks = set()
    for name in names:
        if found := _IN_LAYER.fullmatch(name):
            stored.setdefault((int(found["layer"]), found["child"]), set()).add(name)
            stacks.add(found["stack"])
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"the base's files hold {len(stacks)} stacks of layers "
            f"({', '.join(sorted(stacks)) or 'no name like layers.3.self_attn'}), expected one; "
            "export the text decoder alone"
        )
    chosen: set[str] = set()
    for target, layers in dropped.items():
        for layer in layers:
            mine = set().union(*(stored.get((layer, child), ()) for child in _SUBLAYERS[target]))
            if not mine:
                children = sorted(child for number, child in stored if number == layer)
                raise UnsupportedModelError(
                    f"layer {layer} has no tensors of {' or '.join(_SUBLAYERS[target])} in the "
                    f"base's files (it has {', '.join(children) or 'none at all'}), so its "
                    f"{target} cannot be dropped"
                )
            chosen |= mine | stored.get((layer, (extra or {}).get(target, "")), set())
    return chosen


def copy_without(source: Path, target: Path, left_out: Collection[str]) -> None:
    """Copy a safetensors file without the tensors `left_out`.

    Nothing is written when nothing stays. Raises CheckpointError for a damaged file.
    """
    with open(source, "rb") as reader:
        header, start = _read_header(reader, source)
        metadata = header.pop(_METADATA, None)
        kept = {name: entry for name, entry in header.items() if name not in left_out}
        spans = sorted((entry["data_offsets"], name) for name, entry in kept.items())
        if not spans:
            return
        written: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
        size = 0
        for (begin, end), name in spans:
            written[name] = {**kept[name], "data_offsets": [size, size + end - begin]}
            size += end - begin
        with open(target, "wb") as writer:
            _write_header(writer, written)
            for (begin, end), name in spans:
                reader.seek(start + begin)
                if _copy(reader, writer, end - begin) != end - begin:
                    raise CheckpointError(f"{source} is damaged: it ends inside {name}")


def bytes_of(source: Path, names: Collection[str]) -> int:
    """Return the bytes of some tensors of a safetensors file."""
    with open(source, "rb") as reader:
        header, _ = _read_header(reader, source)
    spans = [entry["data_offsets"] for name, entry in header.items() if name in names]
    return sum(end - begin for begin, end in spans)


def _read_header(reader: BinaryIO, source: Path) -> tuple[dict[str, Any], int]:
    """Return (header, where the data begin)."""
    size = int.from_bytes(reader.read(8), "little")
    try:
        header = json.loads(reader.read(min(size, source.stat().st_size)))
    except ValueError as error:
        raise CheckpointError(f"{source} is damaged: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{source} is damaged: its header is no object")
    return header, 8 + size


def _write_header(writer: BinaryIO, header: Mapping[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    writer.write(len(text).to_bytes(8, "little") + text)


def _copy(reader: BinaryIO, writer: BinaryIO, size: int) -> int:
    """Copy up to `size` bytes; returns how many there were."""
    copied = 0
    while block := reader.read(min(_BLOCK, size - copied)):
        writer.write(block)
        copied += len(block)
    return copied
