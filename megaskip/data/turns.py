"""Turns of a chat: roles, text, tool calls, and the switches that take a turn out of the loss.
Knows no format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaskip.config.checks import did_you_mean
from megaskip.data.fields import Fields, from_json

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

CALLS = ("function_call", "tool_call")
"""Roles of turns that are a tool call and nothing else."""

SWITCHES = {
    "weight": True,
    "loss_weight": True,
    "loss": True,
    "train": True,
    "train_on_turn": True,
    "mask": False,
}
"""Field of a turn that says whether it is learnt -> whether 1 means that it is."""

ON_OFF = {"0": False, "1": True, "false": False, "true": True}
"""Texts that switches may hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn. The model learns it only when `train` is set, which only assistant turns can be."""

    role: str
    content: str
    train: bool = False
    tool_calls: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields that some chat templates read, passed on as they are, such as tool_call_id."""


class ParsedObject(dict[str, Any]):
    """An object that the data hold as JSON text, for templates that want the text."""

    def __init__(self, fields: Mapping[str, Any], *, text: str) -> None:
        super().__init__(fields)
        self.text = text


def make_turn(role: str, content: str) -> Message:
    """Return a turn as its role has it: the assistant's are learnt."""
    return Message(role=role, content=content, train=role == "assistant")


def role_of(turn: Fields, key: str) -> str:
    """Return the chat templates' name of the role under `key`."""
    name = turn.text(key)
    if name.lower() in ROLES:
        return ROLES[name.lower()]
    turn.wrong(key, name, f"one of {', '.join(ROLES)}{did_you_mean(name.lower(), ROLES)}")


def content_of(turn: Fields, key: str) -> str:
    """Return the text of a turn: a string, or a list of parts {type: "text", text or value}."""
    if not isinstance(turn.get(key), list):
        return turn.text(key)
    texts = []
    for item in turn.nested(key):
        if item.get("type") != "text":
            item.wrong("type", item.get("type"), "'text' (megaskip trains on text only)")
        texts.append(item.text("value" if item.get("text") is None else "text"))
    return "".join(texts)


def is_learnt(turn: Fields, role: str) -> bool:
    """Return whether the model learns this turn: an assistant turn that no switch takes out."""
    switched = {key: _switch(turn, key) for key in SWITCHES if turn.get(key) is not None}
    if not switched:
        return role == "assistant"
    for key, on in switched.items():
        if role != "assistant" and on and key != "mask":
            expected = f"0, since a {role} turn is never learnt, only assistant turns are"
            turn.wrong(key, turn.get(key), expected)
        first = next(iter(switched))
        if role == "assistant" and on is not switched[first]:
            turn.wrong(key, turn.get(key), f"what {first!r} says ({turn.get(first)!r})")
    return role == "assistant" and all(switched.values())


def require_clear_masks(turns: Sequence[Fields], roles: Sequence[str]) -> None:
    """Raise DataError where `mask` may be one of the loss (1 is learnt) rather than of the text.

    Numbers that say 0 at every question and 1 at an answer are what a loss mask looks like.
    """
    masks = [(role, turn, turn.get("mask")) for role, turn in zip(roles, turns, strict=True)]
    numbers = [(role, turn, mask) for role, turn, mask in masks if type(mask) is int]
    if any(mask == 0 for role, _, mask in numbers if role != "assistant"):
        for role, turn, mask in numbers:
            if role == "assistant" and mask == 1:
                expected = (
                    "0 (1 takes a turn out of the loss, but the other turns have 0). Rename the "
                    "field to 'train' if 1 means that a turn is learnt; else leave it out of them"
                )
                turn.wrong("mask", mask, expected)


def calls_of(turn: Fields, key: str) -> tuple[dict[str, Any], ...]:
    """Return tool calls as chat templates read them, from JSON text, one object or a list."""
    value = turn.get(key)
    parsed = from_json(value) if isinstance(value, str) else without_nulls(value)
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            turn.wrong(key, value, 'a tool call {"name": ..., "arguments": {...}}')
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            parsed_arguments = from_json(arguments)
            if isinstance(parsed_arguments, dict):
                arguments = ParsedObject(parsed_arguments, text=arguments)
            elif parsed_arguments is not None:
                arguments = parsed_arguments
        function = {"name": inner["name"], "arguments": arguments}
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": function})
    return tuple(calls)


def tools_of(row: Fields) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row as chat templates read them, from JSON text or a list."""
    value = row.get("tools")
    if value is None or value == "":
        return ()
    tools = from_json(value) if isinstance(value, str) else without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        row.wrong("tools", value, "a list of tools, as JSON or as text that holds JSON")
    return tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that are null in its objects, at any depth.

    Arrow (Parquet, save_to_disk, the hub) gives all objects of a column the same keys: one with an
    argument `x` gives every other call an `x` of null, which no model should see.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _switch(turn: Fields, key: str) -> bool:
    """Return whether a switch says that the turn is learnt."""
    value = turn.get(key)
    on = ON_OFF.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, bool | int | float) and value in (0, 1):
        on = bool(value)
    if on is None:
        turn.wrong(key, value, "0 or 1, false or true: a turn is learnt whole or not at all")
    return on is SWITCHES[key]
