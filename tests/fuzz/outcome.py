"""What a changed input may do: succeed or be refused by a MegaskipError, soon, and nothing else."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings

from megaskip.errors import MegaskipError

SECONDS = 20
"""Of computing, which other jobs on the machine do not lengthen: an input that takes more hangs.
One that waits for something ends with the test's own timeout."""
LONG = "long"
"""The hypothesis profile of an hour."""
_TIMES = 80
"""How many times as many inputs it tries."""
_LONGEST_MESSAGE = 4000
_OPENED = 0x20
"""inotify's IN_OPEN."""


def fuzzed(inputs: int) -> Callable[[Any], Any]:
    """Return a decorator that tries a hypothesis test on `inputs` examples, the same in every run;
    with --hypothesis-profile long on many times as many, new ones in every run."""
    is_long = settings.get_current_profile_name() == LONG
    return settings(
        max_examples=inputs * _TIMES if is_long else inputs,
        derandomize=not is_long,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """An input that is still worked on when its time is over; no handler of errors takes it."""


@contextlib.contextmanager
def ends_well(seconds: int = SECONDS) -> Iterator[None]:
    """Let a block end in success or in a MegaskipError with a readable message; every other error
    goes on, and so does a HangError after `seconds`."""
    before = signal.signal(signal.SIGPROF, _time_is_over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    message = "-"
    try:
        yield
    except MegaskipError as error:
        message = str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert message.strip(), "an error that says nothing"
    assert "Traceback" not in message
    assert len(message) <= _LONGEST_MESSAGE, f"a message of {len(message)} characters"


def _time_is_over(number: int, frame: FrameType | None) -> None:
    raise HangError("the input hangs")


class Watched:
    """Files that nobody may open, by the kernel's own account: Rust and C++ readers included."""

    def __init__(self, *files: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._queue = libc.inotify_init1(os.O_NONBLOCK)
        assert self._queue >= 0, "inotify is not available"
        for file in files:
            watch = libc.inotify_add_watch(self._queue, os.fsencode(file), _OPENED)
            assert watch >= 0, f"{file} cannot be watched"

    def was_opened(self) -> bool:
        """Return whether any of the files was opened since the last call."""
        try:
            return bool(os.read(self._queue, 65536))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Watch no longer."""
        os.close(self._queue)
