"""Small checks shared by the sections: each returns the problem as a sentence, or nothing."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping

from megaskip.config.value_types import shown


def one_of(
    flag: str, value: str, choices: Iterable[str], *, elsewhere: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield a problem when `value` is none of `choices`, with the closest one as a suggestion; for
    values that other commands take, `elsewhere` has the end of the sentence, as did_you_mean."""
    if value in (choices := tuple(choices)):
        return
    hint = (elsewhere or {}).get(value) or did_you_mean(value, choices)
    yield f"--{flag} {shown(value)} is not one of {', '.join(choices)}{hint}"


def share(flag: str, value: float, *, above_zero: bool = False) -> Iterator[str]:
    """Yield a problem when `value` lies outside [0, 1], or (0, 1] with `above_zero`."""
    if not 0 <= value <= 1 or (above_zero and value == 0):
        yield f"--{flag} {value:g} is outside {'(' if above_zero else '['}0, 1]"


def percentage(flag: str, value: float) -> Iterator[str]:
    """Yield a problem when `value` lies outside [1, 100): below 1 it is meant as a share."""
    if 0 < value < 1:
        yield f"--{flag} {value:g} is in percent; a share of {value:g} is written {100 * value:g}"
    elif not 1 <= value < 100:
        yield f"--{flag} {value:g} must lie inside [1, 100): it is in percent"


def share_hint(value: float) -> str:
    """Return what a share is written as that was given in percent, for the end of a message."""
    return f"; {value:g} percent is written {value / 100:g}" if 2 <= value <= 100 else ""


def at_least(flag: str, value: float, low: float) -> Iterator[str]:
    """Yield a problem when `value` is below `low`."""
    yield from finite(flag, value)
    if value < low:
        yield f"--{flag} {value:g} must be at least {low:g}"


def finite(flag: str, value: float) -> Iterator[str]:
    """Yield a problem when `value` is infinite or no number."""
    if not math.isfinite(value):
        yield f"--{flag} {value:g} must be a finite number"


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """Return '; did you mean ...?' for the choice closest to `value`, or nothing."""
    close = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def closest(value: str, choices: Iterable[str], *, cutoff: float) -> str | None:
    """Return the choice that is spelt most like `value`; None when none is as similar as `cutoff`,
    where 1 is equal."""
    return next(iter(difflib.get_close_matches(value, list(choices), 1, cutoff)), None)
