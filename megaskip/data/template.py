"""Chats rendered by the tokenizer's template, and which tokens of them the model learns."""

import json
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from megaskip.data.formats import Sample
from megaskip.data.turns import Message
from megaskip.errors import DataError
from megaskip.log import get_logger

logger = get_logger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Encoded = tuple[list[int], list[bool]]
"""Token ids and, for each, whether the model learns it."""


class ChatTemplate:
    """A tokenizer with its chat template, or the one in `template_file` instead."""

    def __init__(self, tokenizer: Any, *, template_file: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._override = _read_template(template_file) if template_file else None
        self._origin = template_file or f"the tokenizer in {tokenizer.name_or_path or 'memory'}"
        self._warned: set[str] = set()

    @property
    def exists(self) -> bool:
        return bool(self._override or self.tokenizer.chat_template)

    @property
    def identity(self) -> str:
        """The template's text, for the fingerprint."""
        return json.dumps(self._override or self.tokenizer.chat_template or "")

    def encode(self, sample: Sample) -> Encoded:
        """Tokenise a chat; only its assistant turns with train=True are learnt.

        Raises DataError when there is no template, when it rejects the chat, or when the tokens of
        a turn cannot be told from those around it.
        """
        if not self.exists:
            raise DataError(
                f"{sample.place}: {self._origin} has no chat template: pass --chat_template "
                f"FILE.jinja, or use prompt/completion or plain text data"
            )
        template = self._template_for(sample)
        if sample.tools and "tools" not in template:
            self._warn_once("never mentions tools: the tools of the data are left out")
        turns = [self._as_dict(message, template) for message in sample.messages]
        _require_whole_characters(sample, turns)
        if _GENERATION.search(template) and self.tokenizer.is_fast:
            if (encoded := self._encode_marked(sample, turns)) is not None:
                return encoded
            self._warn_once(
                "has {% generation %} markers that do not cover every assistant turn; "
                "comparing renderings instead"
            )
        return self._encode_by_prefix(sample, turns)

    def _template_for(self, sample: Sample) -> str:
        tools = list(sample.tools) or None
        try:
            return str(self.tokenizer.get_chat_template(self._override, tools=tools))
        except ValueError:  # several templates, none of them called "default"
            names = ", ".join(sorted(self.tokenizer.chat_template))
            raise DataError(
                f"{sample.place}: {self._origin} has several chat templates ({names}) and none is "
                "the default. Write the one you want to a file: --chat_template FILE.jinja"
            ) from None

    def _encode_marked(self, sample: Sample, turns: list[dict[str, Any]]) -> Encoded | None:
        """Use the template's {% generation %} markers; None when they miss a turn."""
        encoded = self._apply(
            sample, turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        wanted = [m.train for m in sample.messages if m.role == "assistant"]
        # transformers returns an all-zero mask, and no error, when it cannot place the markers.
        runs = [
            (bool(marked), len(list(run))) for marked, run in groupby(encoded["assistant_masks"])
        ]
        if sum(marked for marked, _ in runs) != len(wanted):
            return None
        learnt: list[bool] = []
        train = iter(wanted)
        for marked, length in runs:
            learnt += [marked and next(train)] * length
        return list(encoded["input_ids"]), learnt

    def _encode_by_prefix(self, sample: Sample, turns: list[dict[str, Any]]) -> Encoded:
        """Learn what the rendering of each assistant turn adds to the prompt for it."""
        text = self._apply(sample, turns, tokenize=False)
        spans = [
            self._span(sample, turns, index, text)
            for index, message in enumerate(sample.messages)
            if message.train
        ]
        if self.tokenizer.is_fast:
            return self._encode_with_offsets(text, spans)
        return self._encode_with_prefixes(sample, text, spans)

    def _span(
        self, sample: Sample, turns: list[dict[str, Any]], index: int, text: str
    ) -> tuple[int, int]:
        """Return the characters of `text` that a turn adds, its end-of-turn token included."""
        head = self._apply(sample, turns[:index], tokenize=False, add_generation_prompt=True)
        last = index + 1 == len(turns)
        tail = text if last else self._apply(sample, turns[: index + 1], tokenize=False)
        start, end = _prefix_length(head, tail), _prefix_length(tail, text)
        if start >= 0 and end >= 0:
            return start, end
        if start >= 0 and text.startswith(head):
            kept = _kept_length(tail[len(head) :], text[len(head) :], turns[index]["content"])
            if kept:
                return len(head), len(head) + kept
        longer, shorter = (text, tail) if start >= 0 else (tail, head)
        same = _common_length(longer, shorter)
        raise DataError(
            f"{sample.place}: the chat template of {self._origin} renders turn {index + 1} "
            f"differently once more text follows ({shorter[same : same + 30]!r} becomes "
            f"{longer[same : same + 30]!r}), so its tokens cannot be told from the prompt. "
            f"Pass a --chat_template FILE.jinja that keeps what it has rendered, or has "
            f"{{% generation %}} around the assistant's text; or keep one assistant turn per chat"
        )

    def _encode_with_offsets(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        starts = [start for start, _ in encoded["offset_mapping"]]
        learnt = [any(low <= start < high for low, high in spans) for start in starts]
        return list(encoded["input_ids"]), learnt

    def _encode_with_prefixes(
        self, sample: Sample, text: str, spans: list[tuple[int, int]]
    ) -> Encoded:
        """A slow tokenizer gives no offsets: count the tokens of each prefix instead."""
        ids = self._ids(text)
        learnt = [False] * len(ids)
        for low, high in spans:
            start = self._border(sample, ids, text[:low])
            end = len(ids) if high == len(text) else self._border(sample, ids, text[:high])
            learnt[start:end] = [True] * (end - start)
        return ids, learnt

    def _border(self, sample: Sample, ids: list[int], prefix: str) -> int:
        border = _common_length(ids, self._ids(prefix))
        # White space at the end of a prompt may become one token with the word after it.
        if border >= len(self._ids(prefix.rstrip())):
            return border
        raise DataError(
            f"{sample.place}: {self._origin} merges the end of the prompt {prefix[-20:]!r} with "
            f"what follows into one token. Use the fast version of the tokenizer (tokenizer.json)"
        )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _apply(self, sample: Sample, turns: list[dict[str, Any]], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                turns, tools=list(sample.tools) or None, chat_template=self._override, **options
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise DataError(
                f"{sample.place}: the chat template of {self._origin} rejects this conversation of "
                f"{' > '.join(turn['role'] for turn in turns)} ({error}). Change the roles in "
                f"the data, or pass a --chat_template FILE.jinja that takes them"
            ) from error

    def _as_dict(self, message: Message, template: str) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
        if not message.tool_calls:
            return turn
        if "tool_calls" in template:
            return {**turn, "tool_calls": list(message.tool_calls)}
        self._warn_once(
            "never mentions tool_calls: a tool call becomes the text of its turn, as JSON"
        )
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
        return {**turn, "content": "\n".join([message.content, *calls]).strip()}

    def _warn_once(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("The chat template of %s %s.", self._origin, what)


def _require_whole_characters(sample: Sample, turns: list[dict[str, Any]]) -> None:
    """Raise DataError for half of a surrogate pair, as a cut-off emoji leaves it in JSON."""
    try:
        json.dumps([turns, sample.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DataError(
            f"{sample.place}: a tool, a tool call or another field of a turn holds {half!a}, half "
            "of a character; expected text of whole characters"
        ) from None


def _read_template(file: str) -> str:
    path = Path(file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"--chat_template {file!r} cannot be read: {error.strerror}") from error


def _prefix_length(prefix: str, text: str) -> int:
    """Return where `prefix` ends in `text`, or -1 if more than its trailing white space differs."""
    if text.startswith(prefix):
        return len(prefix)
    same = _common_length(prefix, text)
    return same if same >= len(prefix.rstrip()) else -1


def _kept_length(alone: str, followed: str, content: str) -> int:
    """Return how many characters of `followed` are this turn, `alone` without some of its start; 0
    when more of it has changed.

    Qwen3's template, among others, drops the reasoning of a turn once a later question follows.
    """
    last_line = content.strip().rpartition("\n")[2]
    for start in range(1, len(alone)):
        if followed.startswith(alone[start:]):
            return len(alone) - start if last_line and last_line in alone[start:] else 0
    return 0


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading elements are equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
