"""safetensors files without some of their tensors.

Bytes are copied and nothing is decoded: any type passes, and a block of memory is enough.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megaskip.arch.sites import SUBLAYERS
from megaskip.checkpoint.header import METADATA, read_header
from megaskip.errors import UnsupportedModelError

_BLOCK = 8 << 20
_ALIGNMENT = 8
_IN_LAYER = re.compile(r"(?P<stack>(?:.+?\.)?layers)\.(?P<layer>\d+)\.(?P<child>[^.]+)\..+")


def names_of_dropped(
    names: Iterable[str],
    dropped: Mapping[str, Sequence[int]],
    extra: Mapping[str, str] | None = None,
) -> set[str]:
    """Return the stored tensors of dropped sublayers: `dropped` has layers by attn or mlp.

    `extra` names one further child of the layer that goes with each. Raises UnsupportedModelError
    when the files do not say clearly which tensors these are.
    """
    names = list(names)
    stack_of_layers(names)
    stored: dict[tuple[int, str], set[str]] = {}
    for name in names:
        if match := _IN_LAYER.fullmatch(name):
            stored.setdefault((int(match["layer"]), match["child"]), set()).add(name)
    chosen: set[str] = set()
    for target, layers in dropped.items():
        for layer in layers:
            mine = set().union(*(stored.get((layer, child), ()) for child in SUBLAYERS[target]))
            if not mine:
                children = sorted(child for number, child in stored if number == layer)
                raise UnsupportedModelError(
                    f"layer {layer} has no tensors of {' or '.join(SUBLAYERS[target])} in the "
                    f"base's files (it has {', '.join(children) or 'none at all'}), so its "
                    f"{target} cannot be dropped"
                )
            chosen |= mine | stored.get((layer, (extra or {}).get(target, "")), set())
    return chosen


def stack_of_layers(names: Iterable[str]) -> str:
    """Return what the names of layers begin with in files, such as "model.layers".

    Raises UnsupportedModelError unless there is one stack of layers.
    """
    stacks = {match["stack"] for name in names if (match := _IN_LAYER.fullmatch(name))}
    if len(stacks) != 1:
        raise UnsupportedModelError(
            f"the base's files hold {len(stacks)} stacks of layers "
            f"({', '.join(sorted(stacks)) or 'no name like layers.3.self_attn'}), expected one; "
            "export the text decoder alone"
        )
    return stacks.pop()


def copy_without(source: Path, target: Path, left_out: Collection[str]) -> None:
    """Copy a safetensors file without the tensors `left_out`.

    Nothing is written when nothing stays. Raises CheckpointError for a damaged file.
    """
    header, start = read_header(source)
    metadata = header.pop(METADATA, None)
    kept = {name: entry for name, entry in header.items() if name not in left_out}
    spans = sorted((entry["data_offsets"], name) for name, entry in kept.items())
    if not spans:
        return
    written: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
    size = 0
    for (begin, end), name in spans:
        written[name] = {**kept[name], "data_offsets": [size, size + end - begin]}
        size += end - begin
    with open(source, "rb") as reader, open(target, "wb") as writer:
        _write_header(writer, written)
        for (begin, end), _ in spans:
            reader.seek(start + begin)
            _copy(reader, writer, end - begin)


def bytes_of(source: Path, names: Collection[str]) -> int:
    """Return the bytes of some tensors of a safetensors file."""
    header, _ = read_header(source)
    spans = [entry["data_offsets"] for name, entry in header.items() if name in names]
    return sum(end - begin for begin, end in spans)


def _write_header(writer: BinaryIO, header: Mapping[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    writer.write(len(text).to_bytes(8, "little") + text)


def _copy(reader: BinaryIO, writer: BinaryIO, size: int) -> None:
    """Copy `size` bytes."""
    while size and (block := reader.read(min(_BLOCK, size))):
        writer.write(block)
        size -= len(block)
