"""Inputs that differ from a good one: in values, in structure, in bytes, in files of a folder."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\nb",
        "\ud800",
        "\u00b2",
        "\u0663",
        "\u2028",
        "%s{}",
        "-",
        "--",
        "~",
        "x" * 999,
    ),
    *(
        "true",
        "NaN",
        "inf",
        "1e999",
        "-1",
        "0",
        "007",
        "1_0",
        "9" * 30,
        "1" * 5000,
        "0-999999999999",
    ),
    *("half", "demo", "auto", "none", "null", "{}", "[]", '{"a": 1}', "<|im_end|>", "</s>"),
    *(".", "..", "/", "../outside/secret", "../outside/secret.safetensors", "nul\0byte"),
)
ODD_NUMBERS = (
    *(0, 1, -1, 2, 31, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1.5, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf")),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, [{}], {"a": [1]}, [1, "a"], [0.5]),
    *ODD_NUMBERS,
    *ODD_TEXTS,
)
ODD_FILES = (
    *(b"", b"\n", b"null", b"[]", b"{}", b"[{}]", b"0", b'"text"', b"\xff\xfe", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\0" * 4096, b"{" + b" " * 9000, b"NaN"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12\n",
    b"&a [*a, *a]",
    b"a: &a [1]\nb: *c\n",
)


def odd_values() -> st.SearchStrategy[Any]:
    """Return values that no setting is meant to have, and some that it may have."""
    return (
        st.sampled_from(ODD_VALUES).map(copy.deepcopy)
        | st.text(max_size=12)
        | st.integers()
        | st.floats()
    )


@st.composite
def changed_json(draw: st.DrawFn, document: Any, most: int = 3) -> Any:
    """Return `document` with one to `most` values replaced, removed, wrapped, renamed, doubled."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        positions = list(_positions(changed))
        if not positions:
            return draw(odd_values())
        holder, key = positions[draw(st.integers(0, len(positions) - 1))]
        _change(draw, holder, key)
    return changed


def _change(draw: st.DrawFn, holder: Any, key: Any) -> None:
    kind = draw(
        st.sampled_from(("replace", "replace", "remove", "wrap", "rename", "double", "move"))
    )
    if kind == "remove":
        del holder[key]
    elif kind == "wrap":
        holder[key] = [holder[key]] if draw(st.booleans()) else {"a": holder[key]}
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from(ODD_TEXTS) | st.just(f"{key}s"))] = holder.pop(key)
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == "move":
        positions = list(_positions(holder))
        other, name = positions[draw(st.integers(0, len(positions) - 1))]
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = draw(odd_values())


def _positions(node: Any) -> Any:
    """Yield (container, key) of all values in a document."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from _positions(node[key])


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` cut off, with some bytes changed, put in or taken out, or other content."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(ODD_FILES))
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(len(content) - 1, 0)))
        head, tail = content[:position], content[position:]
        kind = draw(st.sampled_from(("cut", "flip", "put in", "take out", "double")))
        if kind == "cut":
            content = head
        elif kind == "flip":
            content = head + bytes([draw(st.integers(0, 255))]) + tail[1:]
        elif kind == "put in":
            content = head + draw(st.binary(min_size=1, max_size=9)) + tail
        elif kind == "take out":
            content = head + tail[draw(st.integers(1, 40)) :]
        else:
            content = head + tail[:200] + tail
    return content


def changed_json_file(document: Any, most: int = 3) -> st.SearchStrategy[bytes]:
    """Return the bytes of a JSON file: `document` with changed values, or with changed bytes."""
    by_value = changed_json(document, most).map(lambda value: json.dumps(value).encode())
    return by_value | changed_bytes(json.dumps(document, indent=1).encode())


@st.composite
def changed_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a good safetensors file with a changed header, header length, or other bytes."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = draw(st.sampled_from(("header", "header", "length", "bytes")))
    if kind == "bytes":
        return draw(changed_bytes(content))
    if kind == "length":
        other = draw(st.sampled_from((0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1)))
        return other.to_bytes(8, "little") + content[8:]
    text = draw(changed_json_file(header))
    return len(text).to_bytes(8, "little") + text + data


ODD_ENTRIES = ("gone", "folder", "dangling link", "link to itself", "empty")
"""What may stand in the place of a file."""


def put_odd_entry(file: Path, kind: str) -> None:
    """Put something else than a file, or nothing, in the place of `file`."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "dangling link":
        os.symlink(file.with_name("nothing-there"), file)
    elif kind == "link to itself":
        os.symlink(file, file)
    elif kind == "empty":
        file.write_bytes(b"")
