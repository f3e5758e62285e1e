"""Which characters of a chat are the prompt, and which are learnt. Knows renderings, no tokens.

A learnt turn stands behind what generation would be given to write it. Turns whose prompts are all
in the rendering of the whole chat share a row; any other turn gets a row of its own.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megaskip.data.segments import Segment, SegmentTokenizer
from megaskip.data.template import Chat, Turn
from megaskip.errors import DataError

_OPENED = re.compile(r"<([^\s<>/|]+)>(\s*)$")
"""A tag that a prompt ends in, such as <think>, and the white space behind it."""

_TAG = re.compile(r"<[^<>]*>")

Segments = tuple[Segment, ...]
"""A row as text: its prompt, then what is learnt and what is between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """Where an answer is in a rendering."""

    prompt_end: int
    blank: str
    """White space that the prompt for it ends in and that the rendering does not have."""
    start: int
    """The characters from `prompt_end` to here are neither in the prompt nor learnt."""
    end: int


class AnswerFinder:
    """Splits the renderings of one chat into prompts and answers."""

    def __init__(self, chat: Chat, tokens: SegmentTokenizer) -> None:
        self._chat = chat
        self._tokens = tokens
        self._roles = [turn["role"] for turn in chat.turns]

    def rows(self) -> list[Segments]:
        """Return the rows of the chat; without a learnt turn a single one that is all prompt.

        Raises DataError where the template leaves an answer out.
        """
        messages = self._chat.sample.messages
        learnt = [index for index, message in enumerate(messages) if message.train]
        whole = self._chat.text()
        if not learnt:
            return [(Segment(text=whole),)]
        marks = self._chat.marks()
        answers = {index: self._in_text(index, whole, marks) for index in learnt}
        alone = [self._alone(index) for index, answer in answers.items() if answer is None]
        shared = [answer for answer in answers.values() if answer is not None]
        return [*alone, tuple(_segments(whole, shared))] if shared else alone

    def _in_text(
        self, index: int, text: str, marks: Sequence[tuple[int, int]] | None
    ) -> _Answer | None:
        """Return where a turn is in `text`, which may go on behind it; None when it is not there as
        it would be generated: behind its prompt, and whole."""
        prompt, turn = self._chat.prompt(index), self._chat.turns[index]
        matched = _match(prompt, text)
        if matched is None:
            return None
        prompt_end, blank = matched
        if prompt[-1:].isspace() and turn["content"][:1].isspace():
            # White space that ends the prompt may stand for the answer's own.
            around = self._chat.around(index)
            if around and len(around[0]) < prompt_end and text.startswith(around[0]):
                prompt_end, blank = len(around[0]), prompt[len(around[0]) :]
        if marks is not None:
            start, end = marks[self._roles[:index].count("assistant")]
            start, shown = max(start, prompt_end), prompt_end
            end = self._marked_end(index, text, start, end)
        else:
            start = shown = prompt_end + self._header_length(index, text[prompt_end:])
            end = self._end(index, start, text)
            end = start + self._end_length(index, text[start:end]) if end > start else end
        is_whole = turn.get("tool_calls") or _is_whole(turn["content"], text[shown:end])
        if start >= end or not is_whole:
            return None
        if blank:
            start += _blank_length(text[start:end], turn["content"])
        return _Answer(prompt_end=prompt_end, blank=blank, start=start, end=end)

    def _alone(self, index: int) -> Segments:
        """Return a row of a prompt and the answer to it, whatever the template makes of that turn
        when more follows."""
        prompt, text = self._chat.prompt(index), self._chat.text(index + 1)
        answer = self._in_text(index, text, self._chat.marks(index + 1))
        if answer is not None:
            return tuple(_segments(text[: answer.end], [answer]))
        around = self._chat.around(index)
        if around is None:
            raise DataError(
                f"{self._chat.sample.place}: the chat template of {self._chat.template.origin} "
                f"leaves out the text of turn {index + 1}, an answer that is to be learnt. Pass a "
                "--chat_template FILE.jinja that prints it"
            )
        turn, (before, behind) = self._chat.turns[index], around
        closing, body = self._after_opened(turn, prompt, before, self._body(turn, text, around))
        learnt = body + self._end_of(behind)
        return Segment(text=prompt), Segment(text=closing), Segment(text=learnt, learnt=True)

    def _body(self, turn: Turn, text: str, around: tuple[str, str]) -> str:
        """Return what the template prints of a turn, in the rendering `text` that ends in it; the
        turn's own text where the template leaves some of it out."""
        before, behind = around
        fits = len(text) >= len(before) + len(behind)
        if not (fits and text.startswith(before) and text.endswith(behind)):
            return str(turn["content"])
        body = text[len(before) : len(text) - len(behind)]
        is_cut = not _is_whole(turn["content"], body) and _is_whole(body, turn["content"])
        return str(turn["content"]) if is_cut and not turn.get("tool_calls") else body

    def _after_opened(self, turn: Turn, prompt: str, before: str, body: str) -> tuple[str, str]:
        """Return (text that is not learnt, answer) behind a prompt that may have opened a tag.

        Reasoning goes on in the tag. An answer without reasoning stands behind the closed tag.
        """
        opened = _OPENED.search(prompt)
        tag = f"<{opened[1]}>" if opened else ""
        if opened is None or before.rstrip().endswith(tag):
            return "", body
        if body.lstrip().startswith(tag):
            return "", body.lstrip().removeprefix(tag).removeprefix(opened[2])
        closing = f"</{opened[1]}>"
        reasoning = turn.get("reasoning_content") or turn.get("thinking")
        if closing in body:
            return "", body
        if reasoning:
            return "", f"{str(reasoning).strip()}\n{closing}\n\n{body}"
        self._chat.template.warn_once(
            f"begins every answer with {tag}: answers without reasoning stand behind {closing}, "
            "which is not learnt"
        )
        return f"\n{closing}\n\n", body

    def _marked_end(self, index: int, text: str, start: int, end: int) -> int:
        """Return where an answer ends whose marks end at `end`: behind its end token, which marks
        may leave out, and before what follows that."""
        length = self._end_length(index, text[start:end])
        around = self._chat.around(index)
        token = self._end_of(around[1]) if around else ""
        if start + length < end or not token.strip() or text[start:end].endswith(token):
            return start + length
        if not text.startswith(token, end):
            return end
        self._chat.template.warn_once(
            f"marks answers without their end token {token.strip()}: it is learnt, too"
        )
        return end + len(token)

    def _header_length(self, index: int, answer: str) -> int:
        """Return how many characters of `answer` are the header of the turn: what a template that
        has no prompt for an answer prints before one."""
        prompt = self._chat.prompt(index)
        if not self._chat.text(index).startswith(prompt):
            return 0
        around = self._chat.around(index)
        header = around[0][len(prompt) :] if around and around[0].startswith(prompt) else ""
        return len(header) if answer.startswith(header) else 0

    def _end(self, index: int, start: int, text: str) -> int:
        """Return where in `text` the turn that begins at `start` ends, or -1."""
        if index + 1 == len(self._roles):
            return len(text)
        whole_turn = self._chat.text(index + 1)
        if whole_turn[:start] != text[:start]:
            return -1
        alone, followed = whole_turn[start:], text[start:]
        matched = _match(alone, followed)
        if matched is not None:
            return start + matched[0]
        kept = self._kept_length(index, alone, followed)
        if kept:
            return start + kept
        # A template may end the last turn with one token more.
        same = alone[: _common_length(alone, followed)]
        last = self._tokens.last_special(same)
        content = self._chat.turns[index]["content"].strip()
        if last and content and content in same[: last.start()]:
            return start + last.end()
        return -1

    def _kept_length(self, index: int, alone: str, followed: str) -> int:
        """Return how many characters of `followed` are this turn, `alone` without something that
        the template put at its start; 0 when more of it has changed.

        Qwen3's template, among others, prints an empty reasoning in the last turn only.
        """
        turn = self._chat.turns[index]
        last_line = turn["content"].strip().rpartition("\n")[2]
        for start in range(1, len(alone)):
            if followed.startswith(alone[start:]):
                own = "\n".join(str(turn[key]) for key in turn if key != "role")
                lines = _TAG.sub("", alone[:start]).split("\n")
                is_data = any(line.strip() and line.strip() in own for line in lines)
                is_whole = bool(last_line) and last_line in alone[start:]
                return len(alone) - start if is_whole and not is_data else 0
        return 0

    def _end_length(self, index: int, answer: str) -> int:
        """Return the length of an answer up to its end token; all of it when it has none.

        What a template prints behind the end token, a line break or a second token, is never
        generated.
        """
        turn = self._chat.turns[index]
        content = turn["content"].strip()
        position = answer.find(content) if content and not turn.get("tool_calls") else -1
        if position >= 0:
            position += len(content)
            return position + len(self._end_of(answer[position:]))
        around = self._chat.around(index)
        if around and answer.endswith(around[1]):
            return len(answer) - len(around[1]) + len(self._end_of(around[1]))
        last = self._tokens.last_special(answer)
        return last.end() if last and not answer[last.end() :].strip() else len(answer)

    def _end_of(self, behind: str) -> str:
        """Return the end token of what a template prints behind an answer, and what is before it;
        all where there is none but white space."""
        first = self._tokens.first_special(behind)
        if first:
            return behind[: first.end()]
        return behind.rstrip() or behind


def _segments(text: str, answers: Sequence[_Answer]) -> Iterator[Segment]:
    """Yield a text as prompt, answer, what is between, answer and so on, empty ones left out."""
    position = 0
    for answer in answers:
        yield Segment(text=text[position : answer.prompt_end] + answer.blank)
        between = text[answer.prompt_end : answer.start]
        yield Segment(text=between.lstrip() if answer.blank else between)
        yield Segment(text=text[answer.start : answer.end], learnt=True)
        position = answer.end
    yield Segment(text=text[position:].rstrip())


def _match(prefix: str, text: str) -> tuple[int, str] | None:
    """Return (how much of `prefix` begins `text`, the white space that is left of it); None when
    more is left."""
    if text.startswith(prefix):
        return len(prefix), ""
    same = _common_length(prefix, text)
    return None if prefix[same:].strip() else (same, prefix[same:])


def _common_length(first: str, second: str) -> int:
    """Return how many leading characters are equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _blank_length(answer: str, content: str) -> int:
    """Return how much white space `answer` begins with that is not the turn's own."""
    blank, own = _leading_blank(answer), _leading_blank(content)
    return len(blank) - len(own) if blank.endswith(own) else len(blank)


def _leading_blank(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _is_whole(text: str, rendered: str) -> bool:
    """Return whether every line of `text` is in `rendered`, tags, case and white space aside."""
    if text.strip() in rendered:
        return True
    shown = _bare(rendered)
    return all(_bare(line) in shown for line in text.split("\n"))


def _bare(text: str) -> str:
    return "".join(_TAG.sub("", text).split()).casefold()
