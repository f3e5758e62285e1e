"""Rows of the known data formats, turned into one normal form. Knows no files or tokenizers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megaskip.config.checks import closest
from megaskip.config.value_types import shown
from megaskip.data.fields import Fields, Place, is_empty
from megaskip.data.refused import refuse_unread
from megaskip.data.turns import (
    CALLS,
    Message,
    calls_of,
    content_of,
    is_learnt,
    make_turn,
    require_clear_masks,
    role_of,
    tools_of,
)
from megaskip.errors import DataError

_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")
_SYSTEM = ("system", "system_prompt")
"""Columns with the text of a system turn."""
OPTIONAL_COLUMNS = (*_SYSTEM, "context", "tools", "history")
"""Columns that formats of chats read where there are any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The normal form of a row: turns of a chat, or plain text (then there are no messages)."""

    place: Place
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    joinable: bool = False
    """A prompt and its completion, which without a chat template are simply joined."""


def fits_format(fields: Mapping[str, Any]) -> bool:
    """Return whether an object has the keys of a format, so that it is a row."""
    return bool(_format_of(fields))


def detect_format(row: Fields) -> str:
    """Return the name of the format whose keys a row has. Keys of any case count."""
    if name := _format_of(row.raw):
        return name
    known = "; ".join(f"{name} ({', '.join(sorted(FORMATS[name][0]))})" for name in FORMATS)
    hints = [
        f"did you mean {near!r} instead of {shown(key)}?"
        for key in row.raw
        if (near := closest(key.lower(), _all_keys(), cutoff=0.75)) not in (None, key.lower())
    ]
    names = ", ".join(map(shown, row.raw))
    raise DataError(
        f"{row.place}: found fields {names or 'none'}, which is none of the "
        f"known formats: {known}. Rename the fields{'; ' + ' '.join(hints) if hints else ''}"
    )


def normalise(row: Fields, *, format_name: str) -> Sample:
    """Turn one row of the named format into a Sample; a row of another shape is a DataError, and so
    is one with fields that must not be ignored."""
    sample = FORMATS[format_name][1](row)
    refuse_unread(row, (sample.text, *(message.content for message in sample.messages)))
    return sample


def _alpaca(row: Fields) -> Sample:
    asked, extra = row.text("instruction"), row.optional_text("input")
    asked = f"{asked}\n\n{extra}" if extra.strip() else asked
    return _question(row, asked, row.text("output"))


def _prompt_completion(row: Fields) -> Sample:
    sample = _question(row, row.text("prompt"), row.text("completion"))
    # Without a chat template only a prompt and its completion can be joined.
    return replace(sample, joinable=len(sample.messages) == 2 and not sample.tools)


def _question_answer(row: Fields) -> Sample:
    return _question(row, row.text("question"), row.text("answer"))


def _plain(row: Fields) -> Sample:
    return Sample(place=row.place, text=row.text("text"))


def _question(row: Fields, asked: str, answered: str) -> Sample:
    """Return a question and its answer behind the earlier ones of a `history` column."""
    turns = []
    for index, pair in enumerate(row.entries("history") if row.get("history") else []):
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            row.wrong(f"history[{index}]", pair, "a pair of texts [asked, answered]")
        turns += [make_turn("user", pair[0]), make_turn("assistant", pair[1])]
    turns += [make_turn("user", asked), make_turn("assistant", answered)]
    return _chat(row, turns)


def _sharegpt(row: Fields) -> Sample:
    turns, roles, fields = [], [], row.nested("conversations")
    for turn in fields:
        role, is_call = role_of(turn, "from"), turn.text("from").lower() in CALLS
        turns.append(
            Message(
                role=role,
                content="" if is_call else content_of(turn, "value"),
                train=is_learnt(turn, role),
                tool_calls=calls_of(turn, "value") if is_call else (),
            )
        )
        roles.append(role)
    require_clear_masks(fields, roles)
    return _chat(row, turns)


def _messages(row: Fields) -> Sample:
    turns, roles, fields = [], [], row.nested("messages")
    for turn in fields:
        role, is_call = role_of(turn, "role"), turn.text("role").lower() in CALLS
        calls = calls_of(turn, "content") if is_call else ()
        calls = calls_of(turn, "tool_calls") if turn.get("tool_calls") else calls
        bare = turn.get("content") is None or is_call
        turns.append(
            Message(
                role=role,
                content="" if calls and bare else content_of(turn, "content"),
                train=is_learnt(turn, role),
                tool_calls=calls,
                extra={k: turn.get(k) for k in _PASSED_ON if turn.get(k) is not None},
            )
        )
        roles.append(role)
    require_clear_masks(fields, roles)
    return _chat(row, turns)


def _chat(row: Fields, turns: list[Message]) -> Sample:
    """Return turns with what the columns `system`, `system_prompt`, `context` and `tools` add."""
    turns = _with_system(row, turns)
    if turns[0].role == "assistant":
        raise DataError(
            f"{row.place}: the conversation begins with an assistant turn, which answers nothing; "
            "expected a system or user turn first. Remove that turn"
        )
    turns = _with_context(row, turns)
    return Sample(place=row.place, messages=tuple(turns), tools=tools_of(row))


def _with_system(row: Fields, turns: list[Message]) -> list[Message]:
    texts = [(key, row.optional_text(key)) for key in _SYSTEM if not is_empty(row.get(key))]
    for key, text in texts:
        if text != texts[0][1]:
            row.wrong(key, text, f"the text of {texts[0][0]!r}, or only one of them")
        if turns[0].role in ("system", "developer") and turns[0].content != text:
            expected = f"the text of the {turns[0].role} turn, or only one of them"
            row.wrong(key, text, expected)
    if not texts or turns[0].role in ("system", "developer"):
        return turns
    return [make_turn("system", texts[0][1]), *turns]


def _with_context(row: Fields, turns: list[Message]) -> list[Message]:
    """Put the `context` column, a text or several, before the first question."""
    value = row.get("context")
    if is_empty(value):
        return turns
    texts = value if isinstance(value, list) else [row.text("context")]
    if not all(isinstance(text, str) for text in texts):
        row.wrong("context", value, "text, or a list of texts")
    if "user" not in (roles := [turn.role for turn in turns]):
        row.wrong("context", value, "no context, since no user turn asks about it")
    first = roles.index("user")
    content = "\n\n".join([*texts, turns[first].content])
    return [*turns[:first], replace(turns[first], content=content), *turns[first + 1 :]]


FORMATS: dict[str, tuple[frozenset[str], Callable[[Fields], Sample]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "prompt/completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "question/answer": (frozenset({"question", "answer"}), _question_answer),
    "plain text": (frozenset({"text"}), _plain),
}
"""Format name -> the keys that tell it (the first match wins) and its reader."""


def _format_of(fields: Mapping[str, Any]) -> str:
    keys = {key.lower() for key in fields}
    return next((name for name, (needed, _) in FORMATS.items() if needed <= keys), "")


def _all_keys() -> list[str]:
    return sorted({key for needed, _ in FORMATS.values() for key in needed})
