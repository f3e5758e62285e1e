"""Whether a path can be written: asked before hours of computing, not after."""

from collections.abc import Iterator
from pathlib import Path

from megaskip.errors import ConfigError


def why_unwritable(folder: Path) -> str | None:
    """Return why a folder, or the nearest one above it that exists, cannot be written; None if it
    can."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = existing / ".write_test"
    try:
        probe.write_bytes(b"\0" * 65536)
        probe.unlink(missing_ok=True)  # of several ranks, one is first
    except OSError as error:
        return error.strerror or str(error)
    return None


def require_new(output: Path) -> None:
    """Raise ConfigError when there is something at --output, or it is the present folder, in whose
    place another one would come."""
    if output.resolve() == Path.cwd():
        raise ConfigError(f"--output {output} is the present folder; name a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty; name a new folder")


def output_file_problems(file: Path, suffix: str) -> Iterator[str]:
    """Yield what keeps the `file` of --output from being written: it is a folder, or its folder is
    missing or cannot be written."""
    folder = file.absolute().parent
    if file.is_dir():
        yield f"--output {file}: this is a folder; name a {suffix} file"
    elif not folder.is_dir():
        yield f"--output {file}: there is no folder {folder}; make it first"
    elif why := why_unwritable(folder):
        yield f"--output {file}: cannot write there ({why})"
