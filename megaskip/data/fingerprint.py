"""One hash of all that decides the tokenised data: files, tokenizer, template and settings."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaskip.config import DataConfig
from megaskip.data.plain_text import UnreadableTextError, token_ids
from megaskip.data.source import Source, load_hub
from megaskip.data.tokenize import SampleTokenizer
from megaskip.errors import DataError

_VERSION = 5
"""Raise when the same input would give other rows, or the store another layout."""

_PROBE = "Hello  world,\n it's 12,345.67 o'clock \u2014 na\u00efve \u4f60\u597d <s> </s>"

_SETTINGS = ("held_out", "seq_length", "packing", "max_samples", "seed", "streaming")


def fingerprint(
    config: DataConfig,
    tokenizer: Any,
    sample_tokenizer: SampleTokenizer,
    train: Sequence[Source],
    held_out: Sequence[Source],
) -> str:
    """Return 32 hex digits; equal when, and only when, the tokenised data would be."""
    parts = {
        "version": _VERSION,
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "template": sample_tokenizer.template.identity,
        "tokenizer": _tokenizer_identity(tokenizer),
        "train": [(source.weight, _content(source)) for source in train],
        "held_out": [_content(source) for source in held_out],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


Stamps = dict[Path, tuple[int, int]]
"""File -> its size in bytes and when it was last written, in nanoseconds."""


def stamps_of(sources: Sequence[Source]) -> Stamps:
    """Return the stamps of the local files of `sources`; raises DataError for one that is gone."""
    files = (file for source in sources for path in source.files for file in _inside(path))
    return {file: _stamp(file) for file in files}


def require_unchanged(before: Stamps) -> None:
    """Raise DataError for a file whose stamp is another one than `before`: what was read of it is
    not what its fingerprint says."""
    for file, stamp in before.items():
        if _stamp(file) != stamp:
            raise DataError(
                f"{file}: it was written to while it was read; expected a file that is finished. "
                "Start again when it is"
            )


def _stamp(file: Path) -> tuple[int, int]:
    try:
        facts = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    return facts.st_size, facts.st_mtime_ns


def _tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    identity = {
        "class": type(tokenizer).__name__,
        "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "probe": _probed(tokenizer),
        "vocab": sorted(tokenizer.get_vocab().items()),
    }
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # What an earlier call left behind, not what the tokenizer is.
        identity["rules"] = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    return identity


def _probed(tokenizer: Any) -> Any:
    """Return the tokens of a text that shows what a tokenizer does, or why it has none for it."""
    try:
        return token_ids(tokenizer, _PROBE, special=True)
    except UnreadableTextError as error:
        return str(error)


def _content(source: Source) -> list[str]:
    if source.files:
        return [f"{path.name}:{_digest(file)}" for path in source.files for file in _inside(path)]
    if source.streaming:
        return [source.name]
    # The cached files' paths carry the data set's revision.
    return [source.name, *(entry["filename"] for entry in load_hub(source).cache_files)]


def _inside(path: Path) -> list[Path]:
    """Return a file, or the files of a saved data set."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
