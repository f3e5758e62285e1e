"""One row of a file: its place, and look-ups that say what is wrong where. Knows no format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

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


class Fields:
    """One row with its place: typed look-ups that say what is wrong where."""

    def __init__(self, fields: Mapping[str, Any], place: Place, prefix: str = "") -> None:
        self.place = place
        self.raw = fields
        self._prefix = prefix
        self._fields = {key.lower(): value for key, value in fields.items()}
        self._asked: set[str] = set()
        self._nested: list[tuple[str, Fields]] = []

    def get(self, key: str) -> Any:
        self._asked.add(key)
        return self._fields.get(key)

    def columns(self) -> dict[str, bool]:
        """Return {column that is filled: whether it was looked up so far}.

        Columns of nested objects are named 'messages[].role', whatever their index.
        """
        columns = {k: k in self._asked for k, v in self._fields.items() if v is not None}
        for key, inner in self._nested:
            for name, asked in inner.columns().items():
                path = f"{key}[].{name}"
                columns[path] = asked or columns.get(path, False)
        return columns

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
        value = self._present(key)
        if not isinstance(value, list):
            self.wrong(key, value, "a list")
        return value or self.wrong(key, value, "at least one entry")

    def nested(self, key: str) -> "list[Fields]":
        """Return the list of objects under `key`, each with its own place in error texts."""
        inner = []
        for index, value in enumerate(self.entries(key)):
            path = f"{self._prefix}{key}[{index}]"
            if not isinstance(value, Mapping):
                self.wrong(f"{key}[{index}]", value, "an object")
            inner.append(Fields(value, self.place, f"{path}."))
        self._nested += [(key, fields) for fields in inner]
        return inner

    def _present(self, key: str) -> Any:
        if key in self._fields:
            return self.get(key)
        present = ", ".join(map(repr, self._fields)) or "nothing"
        raise DataError(f"{self.place}: field {self._prefix + key!r} is missing; found {present}")

    def wrong(self, key: str, value: Any, expected: str) -> NoReturn:
        shown = json.dumps(value, default=str, ensure_ascii=False)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        kind = _KINDS.get(type(value), type(value).__name__)
        raise DataError(
            f"{self.place}: field {self._prefix + key!r} is {kind} {shown}; expected {expected}"
        )


_KINDS = {
    str: "the text",
    int: "the number",
    float: "the number",
    bool: "the truth value",
    list: "the list",
    dict: "the object",
    type(None): "empty:",
}
