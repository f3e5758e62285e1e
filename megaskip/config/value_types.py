"""Whether values are of the types that the fields of a dataclass are annotated with. Knows no
settings."""

import collections.abc
import dataclasses
import reprlib
import types
import typing
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_BITS = 64
"""Of the largest whole number that is taken."""
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def wrong_types(settings: Any, prefix: str = "--") -> Iterator[str]:
    """Yield a problem for each field of a dataclass whose value is not of the annotated type, as a
    file or a caller in Python may have given it. JSON has lists for tuples and 1 for 1.0. `prefix`
    stands before the name of a field."""
    hints = typing.get_type_hints(type(settings))
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if not is_of(value, hints[item.name]):
            size = "" if _is_small(value) else f" of {_BITS} bits"
            yield (
                f"{prefix}{item.name} is {shown(value)}, expected {type_name(hints[item.name])}"
                f"{size}"
            )


def is_of(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the type `hint`, which may be a union, a tuple or a mapping."""
    kind, members = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(is_of(value, member) for member in members)
    if kind in (tuple, list, collections.abc.Sequence):
        return _holds(value, members)
    if kind in (dict, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping) and all(
            is_of(k, members[0]) and is_of(v, members[1]) for k, v in value.items()
        )
    if hint is Any:
        return True
    if hint in (int, float):
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool) and _is_small(value)
    return isinstance(value, hint)


def shown(value: Any) -> str:
    """Return a value for a message: never more than some 80 characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 70
    text = short.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def type_name(hint: Any) -> str:
    """Return a type as messages call it, such as "a whole number"."""
    members = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(m) for m in members if m is not type(None))
    if typing.get_origin(hint) in (tuple, list, collections.abc.Sequence):
        return f"a list of {_PLURALS.get(members[0], type_name(members[0]))}"
    if typing.get_origin(hint) in (dict, collections.abc.Mapping):
        return "an object"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _holds(value: Any, members: tuple[Any, ...]) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, collections.abc.Sequence):
        return False
    if len(members) == 1 or members[-1] is Ellipsis:
        return all(is_of(item, members[0]) for item in value)
    return len(value) == len(members) and all(map(is_of, value, members))


def _is_small(value: Any) -> bool:
    """Return whether a value is no whole number, or one that arithmetic, counters and generators of
    random numbers take: Python's have no end."""
    return not isinstance(value, Integral) or -(2 ** (_BITS - 1)) <= int(value) < 2 ** (_BITS - 1)
