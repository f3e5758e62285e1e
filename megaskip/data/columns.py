"""Which columns of the rows are filled, and which of them nothing reads. Knows no format."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from megaskip.data.fields import Fields
from megaskip.data.formats import OPTIONAL_COLUMNS
from megaskip.data.refused import is_flag

_LISTED = 12
"""Columns that are listed; more are counted."""
_ADVICE = 2
"""Columns for which there is advice."""


@dataclass(kw_only=True, slots=True)
class ColumnCounts:
    """Counts over the rows of one source that fit its format."""

    rows: int = 0
    filled: dict[str, int] = field(default_factory=dict)
    """Column -> rows in which it holds something; those of turns are named messages[].role."""
    used: list[str] = field(default_factory=list)
    """The columns that the format reads."""
    flags: list[str] = field(default_factory=list)
    """Columns of turns that nothing reads and that hold truth values."""

    def add(self, row: Fields) -> None:
        """Count the columns of a row that its format has read."""
        self.rows += 1
        names: dict[str, bool] = {}
        for column in row.filled():
            names[column.name] = column.used or names.get(column.name, False)
            if is_flag(column) and column.name not in self.flags:
                self.flags.append(column.name)
        for name, is_used in names.items():
            self.filled[name] = self.filled.get(name, 0) + 1
            if is_used and name not in self.used:
                self.used.append(name)

    @property
    def ignored(self) -> list[str]:
        """The columns that nothing reads."""
        return [name for name in self.filled if name not in self.used]

    def shares(self, names: Iterable[str]) -> str:
        """Return columns with the share of rows in which each is filled, the most common first."""
        ordered = sorted(names, key=lambda name: -self.filled[name])
        shown = [f"{name} {self.filled[name] / self.rows:.0%}" for name in ordered[:_LISTED]]
        more = f" and {len(ordered) - _LISTED:,} more" if len(ordered) > _LISTED else ""
        return ", ".join(shown) + more

    def advice(self) -> str:
        """Return what to do about columns that may be meant to be read, or ""."""
        advice = []
        for name in self.flags:
            if name not in self.used:
                advice.append(f"if {name} says whether a turn is learnt, call it train or mask")
        for name in self.ignored:
            if (near := _known_column(name)) is not None:
                advice.append(f"if {name} is what {near} is elsewhere, call it that")
        return "".join(f"; {text}" for text in advice[:_ADVICE])


def _known_column(name: str) -> str | None:
    """Return the column that `name` may be meant for: its singular, or its plural, or more words,
    such as system_message."""
    stems = {column.rstrip("s"): column for column in OPTIONAL_COLUMNS}
    return next((column for stem, column in stems.items() if name.startswith(stem)), None)
