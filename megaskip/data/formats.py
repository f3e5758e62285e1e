"""Rows of the known data formats, turned into one normal form. Knows no files or tokenizers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megaskip.config.checks import closest, did_you_mean
from megaskip.data.fields import Fields, Place
from megaskip.errors import DataError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Every role that data sets use -> the role that chat templates know."""

_CALLS = ("function_call", "tool_call")
_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. The model learns it only when `train` is set, which only assistant turns can be."""

    role: str
    content: str
    train: bool = False
    tool_calls: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that some chat templates read, passed on as they are, such as tool_call_id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The normal form of a row: turns of a chat, or plain text (then there are no messages)."""

    place: Place
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    joinable: bool = False
    """A prompt and its completion, which without a chat template are simply joined."""


def detect_format(row: Fields) -> str:
    """Return the name of the format whose keys a row has. Keys of any case count."""
    keys = {key.lower() for key in row.raw}
    for name, (needed, _) in FORMATS.items():
        if needed <= keys:
            return name
    known = "; ".join(f"{name} ({', '.join(sorted(FORMATS[name][0]))})" for name in FORMATS)
    hints = [
        f"did you mean {near!r} instead of {key!r}?"
        for key in row.raw
        if (near := closest(key.lower(), _all_keys(), cutoff=0.75)) not in (None, key.lower())
    ]
    names = ", ".join(map(repr, row.raw))
    raise DataError(
        f"{row.place}: found fields {names or 'none'}, which is none of the "
        f"known formats: {known}. Rename the fields{'; ' + ' '.join(hints) if hints else ''}"
    )


def normalise(row: Fields, *, format_name: str) -> Sample:
    """Turn one row of the named format into a Sample; a row of another shape is a DataError."""
    return FORMATS[format_name][1](row)


def _alpaca(row: Fields) -> Sample:
    asked = row.text("instruction")
    extra = row.optional_text("input")
    turns = [_turn("system", row.optional_text("system"))] if row.get("system") else []
    for index, pair in enumerate(row.entries("history") if row.get("history") else []):
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            row.wrong(f"history[{index}]", pair, "a pair of texts [asked, answered]")
        turns += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    turns.append(_turn("user", f"{asked}\n\n{extra}" if extra.strip() else asked))
    turns.append(_turn("assistant", row.text("output")))
    return Sample(place=row.place, messages=tuple(turns))


def _sharegpt(row: Fields) -> Sample:
    turns = [_turn("system", row.optional_text("system"))] if row.get("system") else []
    for turn in row.nested("conversations"):
        name = turn.text("from")
        role = _role(turn, "from", name)
        if name.lower() in _CALLS:
            calls = _calls(turn, "value")
            turns.append(Message(role=role, content="", train=True, tool_calls=calls))
        else:
            turns.append(_turn(role, turn.text("value")))
    return _chat(row, turns)


def _messages(row: Fields) -> Sample:
    turns = []
    for turn in row.nested("messages"):
        name = turn.text("role")
        role = _role(turn, "role", name)
        calls = _calls(turn, "content") if name.lower() in _CALLS else ()
        calls = _calls(turn, "tool_calls") if turn.get("tool_calls") else calls
        bare = turn.get("content") is None or name.lower() in _CALLS
        turns.append(
            Message(
                role=role,
                content="" if calls and bare else _content(turn),
                train=_wants_loss(turn, role),
                tool_calls=calls,
                extra={k: turn.get(k) for k in _PASSED_ON if turn.get(k) is not None},
            )
        )
    return _chat(row, turns)


def _prompt_completion(row: Fields) -> Sample:
    turns = (_turn("user", row.text("prompt")), _turn("assistant", row.text("completion")))
    return Sample(place=row.place, messages=turns, joinable=True)


def _question_answer(row: Fields) -> Sample:
    turns = (_turn("user", row.text("question")), _turn("assistant", row.text("answer")))
    return Sample(place=row.place, messages=turns)


def _plain(row: Fields) -> Sample:
    return Sample(place=row.place, text=row.text("text"))


FORMATS: dict[str, tuple[frozenset[str], Callable[[Fields], Sample]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    "prompt/completion": (frozenset({"prompt", "completion"}), _prompt_completion),
    "question/answer": (frozenset({"question", "answer"}), _question_answer),
    "plain text": (frozenset({"text"}), _plain),
}
"""Format name -> the keys that tell it (the first match wins) and its reader."""


def _all_keys() -> list[str]:
    return sorted({key for needed, _ in FORMATS.values() for key in needed})


def _turn(role: str, content: str) -> Message:
    return Message(role=role, content=content, train=role == "assistant")


def _chat(row: Fields, turns: list[Message]) -> Sample:
    if turns[0].role == "assistant":
        raise DataError(
            f"{row.place}: the conversation begins with an assistant turn, which answers nothing; "
            "expected a system or user turn first. Remove that turn"
        )
    return Sample(place=row.place, messages=tuple(turns), tools=_tools(row))


def _role(turn: Fields, key: str, name: str) -> str:
    if name.lower() in ROLES:
        return ROLES[name.lower()]
    turn.wrong(key, name, f"one of {', '.join(ROLES)}{did_you_mean(name.lower(), ROLES)}")


def _content(turn: Fields) -> str:
    """Return the text of a turn: a string, or a list of parts {type: "text", text or value}."""
    if not isinstance(turn.get("content"), list):
        return turn.text("content")
    texts = []
    for item in turn.nested("content"):
        if item.get("type") != "text":
            item.wrong("type", item.get("type"), "'text' (megaskip trains on text only)")
        texts.append(item.text("value" if item.get("text") is None else "text"))
    return "".join(texts)


def _wants_loss(turn: Fields, role: str) -> bool:
    """Return whether the model learns this turn: assistant turns, unless their weight is 0."""
    key = "weight" if turn.get("loss_weight") is None else "loss_weight"
    weight = turn.get(key)
    if weight is None:
        return role == "assistant"
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
        turn.wrong(key, weight, "a number from 0 (no loss on this turn) up")
    if weight > 0 and role != "assistant":
        turn.wrong(key, weight, f"0, since a {role} turn is never learnt, only assistant turns are")
    return weight > 0


def _calls(turn: Fields, key: str) -> tuple[dict[str, Any], ...]:
    """Return tool calls as chat templates read them, from JSON text, one object or a list."""
    value = turn.get(key)
    parsed = _from_json(value) if isinstance(value, str) else value
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            turn.wrong(key, value, 'a tool call {"name": ..., "arguments": {...}}')
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            parsed_arguments = _from_json(arguments)
            arguments = arguments if parsed_arguments is None else parsed_arguments
        function = {"name": inner["name"], "arguments": arguments}
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": function})
    return tuple(calls)


def _tools(row: Fields) -> tuple[dict[str, Any], ...]:
    value = row.get("tools")
    if value is None or value == "":
        return ()
    tools = _from_json(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        row.wrong("tools", value, "a list of tools, as JSON or as text that holds JSON")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def _from_json(text: str) -> Any:
    """Return the parsed text, or None when it is not JSON: the caller says what it expected."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
