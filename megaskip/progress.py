"""How far long work is: a bar on a terminal, and a line of the log twice a minute anywhere else.

Knows no work, and no ranks: who calls it says which process shows something.
"""

import io
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from megaskip.log import get_logger

T = TypeVar("T")

logger = get_logger(__name__)

_SECONDS = 30.0
"""Between two lines of the log."""
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}, {elapsed} so far{postfix}"


def progress_bar(
    work: Iterable[Any] | None = None,
    *,
    desc: str,
    total: float | None = None,
    disable: bool | None = None,
    **settings: Any,
) -> "tqdm[Any]":
    """Return tqdm's bar over `work`, or one that its `update` moves, up to `total`; `settings` are
    further ones of tqdm.

    `disable` True shows nothing, None shows a bar on a terminal. Where stderr is none, as in the
    log of a cluster's job, None writes a line to the log twice a minute, after the first half
    minute.
    """
    if disable is not None or sys.stderr.isatty():
        return tqdm(work, desc=desc, total=total, disable=disable, **settings)
    settings |= {"leave": False, "position": 0, "miniters": 1, "dynamic_ncols": False}
    settings |= {"mininterval": _SECONDS, "maxinterval": _SECONDS, "delay": _SECONDS}
    bar = tqdm(work, desc=desc, total=total, file=_LogLines(), **settings)
    bar.bar_format = _LINE_WITHOUT_TOTAL if bar.total is None else _LINE
    return bar


class ProgressBatches(list[T]):
    """A list of batches, or of their rows; going through it shows how far it is, and leaves
    nothing on a terminal."""

    def __init__(self, batches: Iterable[T], desc: str, *, disable: bool | None = None) -> None:
        """`desc` and `disable` as in progress_bar."""
        super().__init__(batches)
        self._desc, self._disable = desc, disable

    def __iter__(self) -> Iterator[T]:
        batches = super().__iter__()
        yield from progress_bar(
            batches, desc=self._desc, total=len(self), leave=False, disable=self._disable
        )


class _LogLines(io.StringIO):
    """What tqdm writes to: each state of a bar becomes a line of the log."""

    def write(self, text: str) -> int:
        if line := re.sub(r"\x1b\[.|\s+", " ", text).strip():
            logger.info("%s", line)
        return len(text)
