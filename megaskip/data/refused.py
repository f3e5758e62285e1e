"""Fields that no format reads, but that change what a row means: media, and switches of the loss.
Knows no format."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megaskip.data.fields import Column, Fields
from megaskip.data.turns import ON_OFF, SWITCHES

_MEDIUM = "image|img|picture|photo|audio|video"
_MEDIA = re.compile(
    rf"({_MEDIUM})s?(_?(path|file|url|uri|byte|list|base64|data))?s?|pixel_values|multi_?modal_data"
)
"""Names of columns that hold media, or say where they are."""
_ABOUT_MEDIA = re.compile(_MEDIUM)
_PLACEHOLDER = re.compile(rf"<\|?({_MEDIUM})s?(_?\d+)?\|?>")
_LOSS = re.compile(r"(\b|_)(no|not|is|in|un)?(loss|train|mask|weight|learn|supervis)")
"""In the names of fields that say what is learnt, such as loss_mask, train_detail, untrained."""
_STORED = ({"bytes", "path"}, {"array", "sampling_rate"})
"""Keys of a picture, a video or a sound as Arrow stores it."""


def refuse_unread(row: Fields, texts: Iterable[str]) -> None:
    """Raise DataError for a field that was not read and must not be ignored.

    These are media, since the text alone would be learnt as if it were complete, and what says by
    its name which turns are learnt: fields of a turn, and lists. `texts` are those of the row's
    turns.
    """
    unread = [column for column in row.filled() if not column.used]
    for column in unread:
        is_named_so = _MEDIA.fullmatch(column.key) and column.value is not False
        if is_named_so or _is_medium(column.value):
            expected = "no media: megaskip trains on text only. Leave out such rows; or this column"
            row.wrong_at(column, f"{expected}, if the text is complete without it")
        if _LOSS.search(column.key) and _is_switch(column):
            expected = f"another field of a turn ({', '.join(SWITCHES)}) to take it out of the loss"
            row.wrong_at(column, f"{expected}. Rename or remove this one")
    about = [column for column in unread if _ABOUT_MEDIA.search(column.key)]
    for placeholder in (_PLACEHOLDER.search(text) for text in texts) if about else ():
        if placeholder:
            expected = f"no media: {placeholder[0]!r} in the text stands for them"
            row.wrong_at(about[0], f"{expected}, and megaskip trains on text only")


def is_flag(column: Column) -> bool:
    """Return whether a field of a turn that was not read holds a truth value."""
    return "[]." in column.name and not column.used and isinstance(column.value, bool)


def _is_switch(column: Column) -> bool:
    """Return whether the value of a field may say of a turn, or of each turn, that it is learnt."""
    if "[]." in column.name:
        return not isinstance(column.value, str) or column.value.lower() in ON_OFF
    return isinstance(column.value, list) and isinstance(column.value[0], int | float)


def _is_medium(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_medium(value[0])
    if isinstance(value, Mapping):
        return any(keys <= set(value) for keys in _STORED)
    return isinstance(value, bytes)
