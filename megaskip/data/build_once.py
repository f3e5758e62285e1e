"""A folder of the cache of tokenised data, made by the first of all processes that want it, on any
of the machines that share it. Knows no data."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from megaskip.data.store import cache_errors
from megaskip.log import get_logger

logger = get_logger(__name__)

_STALE = 24 * 3600
"""Seconds after which a draft of another machine that nobody has written to is a dead process's."""


def build_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill `folder`, unless it is there; waits for another process that does so.

    Raises DataError where the system refuses the folder.
    """
    with cache_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            _build(folder, write)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache entry; the system frees it when its holder dies."""
    lock = filelock.FileLock(path)
    with cache_errors(path.parent):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info("Another process is tokenising the data; waiting for %s.", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into another folder and rename it: a killed process leaves no folder of that name.

    Locks of shared file systems do not always exclude: a second process works in a folder of its
    own, and takes what the first one has finished.
    """
    with cache_errors(folder.parent):
        own_prefix = f"{folder.name}.tmp-{platform.node()}-"
        for draft in folder.parent.glob(f"{folder.name}.tmp-*"):
            if _is_abandoned(draft, own_prefix):
                shutil.rmtree(draft, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f"{own_prefix}{os.getpid()}-", dir=folder.parent))
        work.chmod(0o755)
    try:
        write(work)
        with cache_errors(folder.parent):
            try:
                os.replace(work, folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_abandoned(draft: Path, own_prefix: str) -> bool:
    """Return whether nobody writes a draft any more: on this machine its process tells, whatever
    the clock says; on others its age."""
    if draft.name.startswith(own_prefix):
        return _is_dead(draft.name.removeprefix(own_prefix).partition("-")[0])
    try:
        return time.time() - draft.stat().st_mtime > _STALE
    except FileNotFoundError:  # another process has removed it
        return False


def _is_dead(process: str) -> bool:
    """Return whether this is the number of a process of this machine that has ended."""
    try:
        os.kill(int(process), 0)
    except (ValueError, PermissionError):
        return False  # another machine's name, or somebody else's process
    except ProcessLookupError:
        return True
    return False
