"""One row of a file: its place, and look-ups that say what is wrong where. Knows no format."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from megaskip.config.value_types import shown
from megaskip.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a row came from, for error texts."""

    file: str
    number: int = 0
    """1-based line of a line-based file, row of a JSON array, a parquet file or a hub data set; 0
    is the whole file."""
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}" if self.number else self.file


class Column(NamedTuple):
    """One filled field of a row."""

    name: str
    """Without indices: messages[].role."""
    path: str
    """With them: messages[3].role."""
    value: Any
    used: bool
    """Whether the field was looked up so far."""

    @property
    def key(self) -> str:
        """The last name of the path: role."""
        return self.name.rpartition(".")[2]


class Fields:
    """One row with its place: typed look-ups that say what is wrong where."""

    def __init__(
        self, fields: Mapping[str, Any], place: Place, prefix: str = "", column: str = ""
    ) -> None:
        """`prefix` is the path of an object in a row, `column` the same without indices."""
        self.place = place
        self.raw = fields
        self._prefix = prefix
        self._column = column
        self._fields = {key.lower(): value for key, value in fields.items()}
        self._is_ambiguous = len(self._fields) < len(fields)
        self._asked: set[str] = set()
        self._nested: list[Fields] = []

    def get(self, key: str) -> Any:
        self._asked.add(key)
        if self._is_ambiguous:
            self._require_single(key)
        return self._fields.get(key)

    def filled(self) -> Iterator[Column]:
        """Yield the fields that hold something, and those of nested objects: neither null nor an
        empty text, list or object, which is what Arrow and CSV files have where a row has none."""
        for key, value in self._fields.items():
            if not is_empty(value):
                yield Column(self._column + key, self._prefix + key, value, key in self._asked)
        for inner in self._nested:
            yield from inner.filled()

    def text(self, key: str) -> str:
        value = self._present(key)
        if not isinstance(value, str):
            self.wrong(key, value, "text")
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a pair, as a cut-off emoji leaves it in JSON
            self.wrong(key, value.encode(errors="replace").decode(), "text of whole characters")
        return value

    def optional_text(self, key: str) -> str:
        return "" if self.get(key) is None else self.text(key)

    def entries(self, key: str) -> list[Any]:
        """Return a list that is not empty; it may be written as JSON text, as in CSV files."""
        value = self._present(key)
        items = from_json(value) if isinstance(value, str) else value
        if not isinstance(items, list):
            self.wrong(key, value, "a list")
        return items or self.wrong(key, value, "at least one entry")

    def nested(self, key: str) -> "list[Fields]":
        """Return the list of objects under `key`, each with its own place in error texts."""
        inner = []
        for index, value in enumerate(self.entries(key)):
            if not isinstance(value, Mapping):
                self.wrong(f"{key}[{index}]", value, "an object")
            path, column = f"{self._prefix}{key}[{index}].", f"{self._column}{key}[]."
            inner.append(Fields(value, self.place, path, column))
        self._nested += inner
        return inner

    def _present(self, key: str) -> Any:
        if key in self._fields:
            return self.get(key)
        present = ", ".join(map(shown, self._fields)) or "nothing"
        raise DataError(f"{self.place}: field {self._prefix + key!r} is missing; found {present}")

    def _require_single(self, key: str) -> None:
        names = [name for name in self.raw if name.lower() == key]
        if len(names) > 1:
            raise DataError(
                f"{self.place}: fields {' and '.join(self._prefix + name for name in names)} are "
                "the same but for their case; expected one of them. Rename or remove the others"
            )

    def wrong(self, key: str, value: Any, expected: str) -> NoReturn:
        """Raise DataError: the field holds `value`, and not what was expected."""
        self._wrong(self._prefix + key, value, expected)

    def wrong_at(self, column: Column, expected: str) -> NoReturn:
        """Raise DataError for a field of this row or of an object in it."""
        self._wrong(column.path, column.value, expected)

    def _wrong(self, path: str, value: Any, expected: str) -> NoReturn:
        text = json.dumps(value, default=str, ensure_ascii=False)
        text = text if len(text) <= 60 else text[:57] + "..."
        kind = _KINDS.get(type(value), type(value).__name__)
        raise DataError(f"{self.place}: field {shown(path)} is {kind} {text}; expected {expected}")


def is_empty(value: Any) -> bool:
    """Return whether a field holds nothing."""
    return value is None or (not value and isinstance(value, str | list | Mapping))


def from_json(text: str) -> Any:
    """Return the parsed text, or None when it is not JSON: the caller says what it expected."""
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        return None


def parse_json(text: str) -> Any:
    """Return what a JSON text holds; raises json.JSONDecodeError for whatever is wrong with it.

    The library has other errors for lists in lists without end and for numbers of thousands of
    digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except _TwiceError as error:
        raise json.JSONDecodeError(f"the key {error} is twice in an object", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None


class _TwiceError(Exception):
    """A key that is twice in an object; which value is meant nobody knows."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(shown(next(name for name in names if names.count(name) > 1)))
    return fields


_KINDS = {
    str: "the text",
    int: "the number",
    float: "the number",
    bool: "the truth value",
    list: "the list",
    dict: "the object",
    type(None): "empty:",
}
