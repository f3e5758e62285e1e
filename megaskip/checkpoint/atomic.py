"""Files and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megaskip.errors import CheckpointError


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well."""
    path = path.resolve()  # of a link, what it leads to
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    old = draft.with_name(f"{draft.name}.old.tmp")
    try:
        yield draft
        draft.chmod(0o755)
        _sync(draft)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(draft, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        why = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {path}: {why}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_text_file(path: Path) -> Iterator[TextIO]:
    """Yield an open temporary file beside `path` that takes its place when the block ends well.

    What is no file, such as /dev/null, is written as it is. Half of a surrogate pair is written as
    its escape, which is what JSON has for it.
    """
    path = path.resolve()  # of a link, what it leads to
    is_replaced = path.is_file() or not path.exists()
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp") if is_replaced else path
    try:
        with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        if is_replaced:
            if path.exists():
                shutil.copymode(path, draft)
            os.replace(draft, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        if is_replaced:
            draft.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors; the order of names does not depend on the run."""
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a readable JSON file, whole or not at all; raises CheckpointError when it cannot be
    written."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; raises CheckpointError when it cannot be written."""
    draft = path.with_name(f".{path.name}.tmp")
    with write_errors(path):
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Let a block that writes to `path` end in a CheckpointError when the system refuses it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} is damaged: expected an object, found {type(content).__name__}"
        )
    return content


def _sync(folder: Path) -> None:
    for file in filter(Path.is_file, folder.rglob("*")):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
