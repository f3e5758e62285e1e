"""An inspection as text for a terminal or a file: the summary, and single rows. Reads no data."""

import json
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from megaskip.data.inspect import InspectedRow
from megaskip.data.row_text import (
    CONTEXT,
    CUT,
    CUT_ANSWER,
    LEARNT,
    PROMPT,
    PROMPT_LEARNT,
    Piece,
    RowReader,
    RowText,
    Span,
)

_COLOURS = {
    PROMPT: "36",
    PROMPT_LEARNT: "30;46",
    LEARNT: "30;42",
    CONTEXT: "2",
    CUT: "31",
    CUT_ANSWER: "30;41",
}
_SPECIAL = "1;4"
"""Bold and underlined, on top of the span's colour."""
_FAINT = "2"
_LABEL = 27
"""Width of the margin that says what a span is."""
_SHOWN_LINES = {CUT: 4, CUT_ANSWER: 4}
"""Lines of a span that are shown; from the middle of a longer one lines are left out."""
_OTHER_LINES = 12
"""The same for the other kinds."""
_SHOWN_CUT = 3
"""Spans beyond the cut that are shown."""
_SHOWN_JSON = 600
"""Characters of a row of a file that are shown where it never became tokens."""

Cell = tuple[str, str]
"""What is printed for one character or special token, and its colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """How to print: with colours or without, and how wide."""

    colour: bool
    width: int = 100

    def paint(self, text: str, code: str) -> str:
        """Return text in a colour (an SGR code), or as it is."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and code and text else text

    def wrapped(self, text: str, code: str, indent: str = "") -> list[str]:
        """Return a sentence as lines of at most the width, all but the first indented further."""
        lines = textwrap.wrap(
            escape(text), self.width, initial_indent=indent, subsequent_indent=f"{indent}  "
        )
        return [self.paint(line, code) for line in lines]

    def title(self, text: str) -> str:
        """Return a line that begins a new block."""
        return self.paint(f"-- {text} ".ljust(self.width, "-"), "1")

    def legend(self) -> list[str]:
        """Return the lines that explain how rows are printed."""
        kinds = {
            PROMPT: "what a sequence router reads (--pool prompt); not learnt",
            LEARNT: "the model learns to predict these tokens: the loss counts them",
            PROMPT_LEARNT: "both: text without a prompt is judged by its first tokens",
            CONTEXT: "seen by the model, neither learnt nor read by a sequence router",
            CUT: "beyond --seq_length: never seen",
        }
        lines = [
            f"  {self.paint(f'{kind:<15}', _COLOURS[kind])} {text}" for kind, text in kinds.items()
        ]
        special = "underlined" if self.colour else "in {braces}"
        return [
            "",
            *lines,
            f"  Special tokens are {special}; \\n is a line break; bars are the borders of a span.",
        ]


def row_lines(
    view: View, reader: RowReader, inspected: InspectedRow, *, fate: str = "", neighbours: int = 0
) -> Iterator[str]:
    """Yield a row: where it is from, what becomes of it, and its text in spans."""
    yield view.title(inspected.place)
    if inspected.row is None:
        yield from view.wrapped(f"dropped: {inspected.message}", "31")
    text = reader.read(inspected)
    if text is None:
        if inspected.parsed.fields is not None:
            yield from _raw_row(view, inspected.parsed.fields.raw)
        return
    pooled, learnt = text.count(PROMPT, PROMPT_LEARNT), text.count(LEARNT, PROMPT_LEARNT)
    counts = f"{text.length} tokens, {pooled} read by a sequence router, {learnt} learnt"
    packed = f"; packed with {neighbours} other samples" if neighbours else ""
    yield f"{fate}{': ' if fate else ''}{counts}{packed}"
    if len(text.ids) > text.length:
        yield view.paint(
            f"cut at token {text.length} of {len(text.ids)}: {len(text.ids) - text.length} are "
            f"lost, {text.count(CUT_ANSWER)} of them answer",
            "31",
        )
    for span, following in zip_longest(text.kept, text.kept[1:]):
        yield from _span_lines(view, span)
        if following and following.kind == LEARNT and span.kind in (PROMPT, CONTEXT):
            yield from _border(view, reader, text, span.end)
    for span in text.cut[:_SHOWN_CUT]:
        yield from _span_lines(view, span)
    if len(text.cut) > _SHOWN_CUT:
        yield f"{'':<{_LABEL}}... and {len(text.cut) - _SHOWN_CUT} more ..."


def _border(view: View, reader: RowReader, text: RowText, at: int) -> Iterator[str]:
    """Yield the tokens on both sides of the place where an answer begins."""
    if at == 1:
        return
    before, behind = reader.border(text.ids, at)
    left, right = " ".join(map(token_text, before)), " ".join(map(token_text, behind))
    label = "token by token:".rjust(_LABEL)
    yield view.paint(f"{label} {left} >|< {right}", _FAINT)


def _span_lines(view: View, span: Span) -> Iterator[str]:
    colour = _COLOURS[span.kind]
    last = span.end - 1
    numbers = f"{span.start}-{last}" if last > span.start else f"{span.start}"
    label = f"{span.kind:<15} {numbers:>{_LABEL - 17}} "
    lines = _wrap(_cells(view, span), view.width - _LABEL - 2)
    shown = [_painted(view, line) for line in lines]
    limit = _SHOWN_LINES.get(span.kind, _OTHER_LINES)
    if len(shown) > limit:
        middle = view.paint(f"... {len(shown) - limit + 1} lines ...", _FAINT)
        shown[limit // 2 : limit // 2 - limit + 1] = [middle]
    yield from _with_margin(view.paint(label, colour), shown)


def _cells(view: View, span: Span) -> Iterator[Cell]:
    """Yield what is printed for each character of a span; "\\n" alone ends a line."""
    colour = _COLOURS[span.kind]
    for text, special in span.pieces:
        if special:
            shown = escape(text) if view.colour else f"{{{escape(text)}}}"
            yield shown, f"{_SPECIAL};{colour}"
            continue
        for character in text:
            if character == "\n":
                yield "\\n", _FAINT
                yield "\n", ""
            else:
                yield escape(character), colour


def _wrap(cells: Iterable[Cell], width: int) -> list[list[Cell]]:
    """Return lines of at most `width` columns, broken behind a space where there is one."""
    lines: list[list[Cell]] = [[]]
    for cell in cells:
        if cell[0] == "\n":
            lines.append([])
            continue
        lines[-1].append(cell)
        if _columns(lines[-1]) > max(width, 20) and len(lines[-1]) > 1:
            spaces = [i for i, (text, _) in enumerate(lines[-1][:-1]) if text == " "]
            cut = spaces[-1] + 1 if spaces and spaces[-1] > width // 2 else len(lines[-1]) - 1
            lines[-1:] = [lines[-1][:cut], lines[-1][cut:]]
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


def _columns(line: Sequence[Cell]) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for text, _ in line for c in text)


def _painted(view: View, line: Sequence[Cell]) -> str:
    painted, run, code = "", "", ""
    for text, colour in line:
        if colour != code:
            painted += view.paint(run, code)
            run, code = "", colour
        run += text
    return painted + view.paint(run, code)


def _raw_row(view: View, fields: object) -> Iterator[str]:
    text = json.dumps(fields, ensure_ascii=False, default=str)
    text = text if len(text) <= _SHOWN_JSON else f"{text[:_SHOWN_JSON]} ..."
    lines = _wrap(((escape(character), "") for character in text), view.width - _LABEL - 2)
    yield from _with_margin(
        "row of the file".ljust(_LABEL), [_painted(view, line) for line in lines]
    )


def _with_margin(label: str, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        margin = " " * _LABEL if number else label
        yield f"{margin}|{line}{'|' if number == len(lines) - 1 else ''}"


def escape(text: str) -> str:
    """Return text with everything that does not print, or that acts on a terminal, as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def token_text(token: Piece) -> str:
    """Return one token alone: text in quotes, a special token in braces."""
    text, special = token
    return f"{{{escape(text)}}}" if special else f"'{escape(text)}'"
