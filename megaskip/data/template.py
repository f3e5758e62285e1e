"""Chats rendered by a tokenizer's template. Knows no tokens: `answers` says what is learnt."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from megaskip.data.formats import Sample
from megaskip.data.turns import Message, ParsedObject
from megaskip.errors import DataError
from megaskip.log import get_logger

logger = get_logger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    RecursionError,
)
"""What the code of a template raises for a chat that it does not expect."""

Turn = dict[str, Any]
"""A turn of a chat as templates read it."""


class ChatTemplate:
    """A tokenizer's chat template, or the one in `template_file` instead."""

    def __init__(self, tokenizer: Any, *, template_file: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._override = read_template(template_file) if template_file else None
        self.origin = template_file or f"the tokenizer in {tokenizer.name_or_path or 'memory'}"
        self._warned: set[str] = set()
        self._wants_text: set[str] = set()

    @property
    def exists(self) -> bool:
        return bool(self._override or self.tokenizer.chat_template)

    @property
    def identity(self) -> str:
        """The template's text, for the fingerprint."""
        return json.dumps(self._override or self.tokenizer.chat_template or "")

    def open(self, sample: Sample) -> "Chat":
        """Return the chat of a sample; raises DataError when there is no template for it."""
        if not self.exists:
            raise DataError(
                f"{sample.place}: {self.origin} has no chat template: pass --chat_template "
                f"FILE.jinja, or use prompt/completion or plain text data"
            )
        tools = list(sample.tools) or None
        try:
            source = choose_template(
                self.tokenizer, override=self._override, tools=tools, origin=self.origin
            )
        except DataError as error:
            raise DataError(f"{sample.place}: {error}") from None
        if sample.tools and "tools" not in source:
            self.warn_once("never mentions tools: the tools of the data are left out")
        chat = Chat(self, sample, source)
        _require_whole_characters(sample, chat.turns)
        return chat

    def turns(self, sample: Sample, source: str) -> list[Turn]:
        """Return the turns of a sample as this template wants them."""
        objects = [self._turn(message, source, as_text=False) for message in sample.messages]
        arguments = [
            call["function"]["arguments"]
            for message in sample.messages
            for call in message.tool_calls
            if isinstance(call["function"]["arguments"], dict)
        ]
        if not arguments or "tool_calls" not in source:
            return objects
        texts = [self._turn(message, source, as_text=True) for message in sample.messages]
        if source in self._wants_text:
            return texts
        if not self._needs_text(sample, source, objects, texts, arguments):
            return objects  # of this sample: another one may print what this one does not
        self._wants_text.add(source)
        return texts

    def _needs_text(
        self,
        sample: Sample,
        source: str,
        objects: list[Turn],
        texts: list[Turn],
        arguments: list[dict[str, Any]],
    ) -> bool:
        """Return whether a template wants the arguments of tool calls as JSON text: those that join
        them to text fail on an object, those that print them print it as Python does."""
        try:
            printed = self.render(sample, source, objects)[0]
        except DataError:
            try:
                self.render(sample, source, texts)
            except DataError:
                return False
            return True
        return any(
            str(argument) in printed and str(argument) != json.dumps(argument, ensure_ascii=False)
            for argument in arguments
        )

    def render(
        self,
        sample: Sample,
        source: str,
        turns: list[Turn],
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, spans of characters in {% generation %}), as apply_chat_template renders.

        `prompt` asks for what makes a model answer, `marks` for the spans. Raises DataError when
        the template rejects the turns.
        """
        try:
            # apply_chat_template has the same call, but keeps the characters of the marks.
            rendered: Any = render_jinja_template(
                conversations=[[_without_empty(turn) for turn in turns]],
                tools=list(sample.tools) or None,
                chat_template=source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.tokenizer.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{sample.place}: the chat template of {self.origin} is not valid Jinja, line "
                f"{error.lineno} ({error.message}); mend it, or pass another --chat_template"
            ) from error
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"{sample.place}: the chat template of {self.origin} rejects this conversation of "
                f"{' > '.join(turn['role'] for turn in turns)} ({error}). Change the turns in "
                f"the data, or pass a --chat_template FILE.jinja that takes them"
            ) from error
        (text,), spans = rendered
        return text, _merged(spans[0]) if marks else []

    def _turn(self, message: Message, source: str, *, as_text: bool) -> Turn:
        turn: Turn = {"role": message.role, "content": message.content, **message.extra}
        for name in message.extra:
            if name not in source:
                self.warn_once(f"never mentions {name}: it is left out of the turns")
        if not message.tool_calls:
            return turn
        if "tool_calls" in source:
            calls = map(_with_text, message.tool_calls) if as_text else message.tool_calls
            return {**turn, "tool_calls": list(calls)}
        self.warn_once(
            "never mentions tool_calls: a tool call becomes the text of its turn, as JSON"
        )
        texts = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
        return {**turn, "content": "\n".join([message.content, *texts]).strip()}

    def warn_once(self, what: str) -> None:
        """Log a sentence about this template, unless it was logged before."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("The chat template of %s %s.", self.origin, what)


class Chat:
    """One conversation under a template: what the template makes of its first turns."""

    def __init__(self, template: ChatTemplate, sample: Sample, source: str) -> None:
        self.template = template
        self.sample = sample
        self.turns = template.turns(sample, source)
        self._source = source
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int | None = None) -> str:
        """Return the rendering of the first `count` turns, or of all."""
        return self._render(len(self.turns) if count is None else count, prompt=False)

    def prompt(self, index: int) -> str:
        """Return what generation would be given to write turn `index`."""
        return self._render(index, prompt=True)

    def marks(self, count: int | None = None) -> list[tuple[int, int]] | None:
        """Return the characters of each assistant turn that {% generation %} marks; None without
        such marks, or when they miss a turn."""
        if not _GENERATION.search(self._source):
            return None
        turns = self.turns[:count]
        _, spans = self.template.render(self.sample, self._source, turns, marks=True)
        if len(spans) == sum(turn["role"] == "assistant" for turn in turns):
            return spans
        self.template.warn_once(
            "has {% generation %} markers that do not cover every assistant turn; "
            "comparing renderings instead"
        )
        return None

    def around(self, index: int) -> tuple[str, str] | None:
        """Return what the template puts before and behind the text of turn `index`, if it were the
        last; None when it does not print that text."""
        turns = [*self.turns[:index], {"role": "assistant", "content": _STAND_IN}]
        text, _ = self.template.render(self.sample, self._source, turns)
        before, printed, behind = text.rpartition(_STAND_IN)
        return (before, behind) if printed else None

    def _render(self, count: int, *, prompt: bool) -> str:
        key = count, prompt
        if key not in self._texts:
            self._texts[key], _ = self.template.render(
                self.sample, self._source, self.turns[:count], prompt=prompt
            )
        return self._texts[key]


_STAND_IN = "MegaskipStandsInForAnAnswer"


def choose_template(
    tokenizer: Any, *, override: str | None = None, tools: Any = None, origin: str
) -> str:
    """Return the template that a chat is rendered with; raises DataError when a tokenizer has
    several and none is the default."""
    try:
        return str(tokenizer.get_chat_template(override, tools=tools))
    except ValueError:
        templates = tokenizer.chat_template
        names = ", ".join(sorted(templates)) if isinstance(templates, dict) else "none"
        raise DataError(
            f"{origin} has several chat templates ({names}) and none is the default. Write the one "
            "you want to a file: --chat_template FILE.jinja"
        ) from None


def read_template(file: str) -> str:
    """Return the text of a template; raises DataError when the file cannot be read."""
    path = Path(file).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--chat_template {file!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--chat_template {file!r} is not UTF-8 text ({error.reason})") from None


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as JSON text, that of the data where they have it."""
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        return call
    is_parsed = isinstance(arguments, ParsedObject)
    text = arguments.text if is_parsed else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _without_empty(turn: Turn) -> Turn:
    return {key: value for key, value in turn.items() if value is not None}


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that hold something, neighbours as one."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], end
        elif start < end:
            merged.append((start, end))
    return merged


def _require_whole_characters(sample: Sample, turns: list[Turn]) -> None:
    """Raise DataError for half of a surrogate pair, as a cut-off emoji leaves it in JSON."""
    try:
        json.dumps([turns, sample.tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DataError(
            f"{sample.place}: a tool, a tool call or another field of a turn holds {half!a}, half "
            "of a character; expected text of whole characters"
        ) from None
