"""Prompts as chat messages, from a file or typed."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megaskip.errors import DataError

Messages = list[dict[str, str]]
"""Messages of a chat, each with role and content."""

_BYTE_ORDER_MARK = "\ufeff"


def read_prompts(path: Path) -> list[Messages]:
    """Return the prompts of a file, a line each; raises DataError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: {error}") from None
    lines = [line.removeprefix(_BYTE_ORDER_MARK) for line in lines]  # of files joined to one
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise DataError(f"--prompts {path} holds no prompt")
    if path.suffix != ".jsonl":
        return [_user(line) for _, line in filled]
    return [_messages(line, f"--prompts {path}, line {number}") for number, line in filled]


def typed_prompts() -> Iterator[Messages | None]:
    """Yield what is typed; None starts a new conversation. Raises DataError where it comes from a
    pipe that has no prompt."""
    is_typed, is_empty = sys.stdin.isatty(), True
    if is_typed:
        print("/new starts over, /quit (or Ctrl-D) ends")
    while True:
        try:
            line = input("> " if is_typed else "").removeprefix(_BYTE_ORDER_MARK).strip()
        except KeyboardInterrupt:
            return
        except EOFError:
            if is_empty and not is_typed:
                raise DataError(
                    "standard input holds no prompt; type them in a terminal, or give --prompts"
                ) from None
            return
        is_empty = is_empty and not line
        line = line.encode(errors="replace").decode()  # bytes that are no text
        if line == "/quit":
            return
        if line:
            yield None if line == "/new" else _user(line)


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _messages(line: str, location: str) -> Messages:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not valid JSON ({error})") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a pair, as a cut-off emoji leaves it in JSON
        half = error.object[error.start : error.end]
        raise DataError(
            f"{location}: {half!a} is half of a character; expected whole ones"
        ) from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return _user(row["prompt"])
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise DataError(f"{location}: expected a field prompt or messages")
    if not row["messages"]:
        raise DataError(f"{location}: there is no message in messages")
    for number, message in enumerate(row["messages"], 1):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise DataError(f"{location}: message {number} is not an object with role and content")
    return list(row["messages"])
