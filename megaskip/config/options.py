"""Settings as dataclasses: how they are checked, and what their fields mean as flags.

Knows no command line and no file.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from megaskip.config.checks import one_of
from megaskip.config.value_types import wrong_types
from megaskip.errors import ConfigError


class Checked:
    """Settings that report all of their problems at once: a base for frozen dataclasses."""

    __slots__ = ()

    def __post_init__(self) -> None:
        # The checks of values can only read what is of the right type.
        problems = tuple(wrong_types(self)) or (*self._wrong_choices(), *self._problems())
        if problems:
            raise ConfigError(*problems)

    def _problems(self) -> Iterator[str]:
        yield from ()

    def _wrong_choices(self) -> Iterator[str]:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            choices, value = item.metadata.get("choices"), getattr(self, item.name)
            elsewhere = item.metadata.get("elsewhere")
            for text in value if isinstance(value, tuple) else (value,):
                if choices and text is not None:
                    yield from one_of(item.name, text, choices, elsewhere=elsewhere)


def exactly_one(given: Mapping[str, object]) -> Iterator[str]:
    """Yield a problem unless one of the flags in `given`, {flag: value or None}, has a value."""
    flags = [f"--{flag}" for flag in given]
    chosen = [f"--{flag}" for flag, value in given.items() if value is not None]
    if not chosen:
        yield f"one of {', '.join(flags)} is required"
    elif len(chosen) > 1:
        yield f"{' and '.join(chosen)} exclude each other: give one of them"


def option(
    default: Any = MISSING,
    *,
    choices: Sequence[str] = (),
    elsewhere: Mapping[str, str] | None = None,
    metavar: str | None = None,
    separator: str | None = None,
    is_flag: bool = True,
    follows: str | None = None,
) -> Any:
    """Return a dataclass field whose flag needs more than a type and a default.

    Without a `default` the flag is required. `choices` are checked when it is parsed, and by
    `Checked` when the dataclass is made in Python; `elsewhere` has, by value, the end of the
    sentence that refuses what other commands take. A tuple is one flag that may be repeated, or,
    with a `separator`, one flag that takes a list. A field that is no flag can follow the flag of
    another section: `seed: int = option(0, is_flag=False, follows="seed")`.
    """
    metadata = {
        "choices": tuple(choices),
        "elsewhere": dict(elsewhere or {}),
        "metavar": metavar,
        "separator": separator,
        "flag": is_flag,
        "follows": follows,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag of a command: a field of its options or of one of their sections."""

    name: str
    """The field's name; on the command line with two dashes in front."""
    owner: type
    """The dataclass that has the field; docs/cli.md has a table for each."""
    kind: Any
    """Type of the value, or of each value of a tuple: bool, int, float, str or Path."""
    doc: str
    default: Any
    """dataclasses.MISSING for a required flag."""
    is_tuple: bool
    separator: str | None
    """Between the values of a tuple that one flag holds; None where the flag is repeated."""
    choices: tuple[str, ...]
    elsewhere: Mapping[str, str]
    """Values that other commands take, with the end of the sentence that refuses them."""
    metavar: str
    takes_list: bool
    """Whether a file may give a list for it, which is passed on as it is."""

    @property
    def is_required(self) -> bool:
        """Return whether it has no default."""
        return self.default is MISSING

    @property
    def is_repeatable(self) -> bool:
        """Return whether it may be given several times."""
        return self.is_tuple and self.separator is None

    @property
    def default_text(self) -> str:
        """Return the default as one would type it; "" where there is none."""
        if self.default is MISSING or self.default in (None, ()):
            return ""
        if self.is_tuple:
            values = (f"{v:g}" if isinstance(v, float) else str(v) for v in self.default)
            return (self.separator or " ").join(values)
        return str(self.default)


@functools.cache
def flags_of(options: Any) -> dict[str, Flag]:
    """Return the flags of a dataclass by name, those of its sections in the place of the section.

    A section is a field whose type is a dataclass. Raises TypeError when two sections have a flag
    of the same name.
    """
    hints, docs = typing.get_type_hints(options), _field_docs(options)
    flags: dict[str, Flag] = {}
    for item in dataclasses.fields(options):
        if is_section(hints[item.name]):
            added = flags_of(hints[item.name])
        elif item.metadata.get("flag", True):
            added = {item.name: _flag(options, item, hints[item.name], docs.get(item.name, ""))}
        else:
            continue
        if twice := flags.keys() & added.keys():
            raise TypeError(f"{options.__name__}: two flags are called {sorted(twice)}")
        flags |= added
    return flags


def is_section(hint: Any) -> bool:
    """Return whether a field of this type stands for the flags of a dataclass of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _flag(owner: type, item: dataclasses.Field[Any], hint: Any, doc: str) -> Flag:
    members = _members(hint)
    is_tuple = typing.get_origin(members[0]) is tuple
    kind = typing.get_args(members[0])[0] if is_tuple else str if str in members else members[0]
    choices = tuple(item.metadata.get("choices", ()))
    metavar = item.metadata.get("metavar") or (
        f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()
    )
    return Flag(
        name=item.name,
        owner=owner,
        kind=kind,
        doc=doc,
        default=item.default,
        is_tuple=is_tuple,
        separator=item.metadata.get("separator"),
        choices=choices,
        elsewhere=item.metadata.get("elsewhere", {}),
        metavar=metavar,
        takes_list=is_tuple or any(typing.get_origin(member) is not None for member in members),
    )


def _members(hint: Any) -> list[Any]:
    """Return the types of a union, None left out; the type itself when it is none."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [member for member in typing.get_args(hint) if member is not type(None)]
    return [hint]


def convert(text: str, kind: Any) -> Any:
    """Return `text` as a value of `kind`; raises ValueError when it is none."""
    return Path(text).expanduser() if kind is Path else kind(text)


def _field_docs(options: Any) -> dict[str, str]:
    """Return the string under each field, those of base classes included."""
    docs: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        if hasattr(cls, "__dataclass_fields__"):
            docs |= _own_field_docs(cls)
    return docs


@functools.cache
def _own_field_docs(cls: Any) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for node, after in zip(body, body[1:], strict=False):
        named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if named and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            docs[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return docs
