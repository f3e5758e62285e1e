"""Contexts and answers as token ids, as training reads texts: begun once, and no end token behind a
context. Knows tokenizers and lengths, not models."""

from collections.abc import Iterator, Sequence
from typing import Any

from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.segments import Segment, SegmentTokenizer
from megaskip.errors import ConfigError

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of what follows it."""


class RequestEncoder:
    """Encodes contexts, answers and texts for a model that reads `max_length` tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._plain_text = PlainTextEncoder(tokenizer)
        self._segments = SegmentTokenizer(tokenizer)
        begin = tokenizer.bos_token_id
        self._kept = list(self._plain_text.start) or ([] if begin is None else [begin])
        self._max_length = max_length

    def context(self, text: str, *, is_chat: bool) -> list[int]:
        """Return the tokens of what is to be answered; a chat brings its special tokens itself."""
        if not text:
            return self._plain_text.split(text)[0]
        return self._plain_text.ids(text) if is_chat else self._plain_text.encode(text)

    def pair(self, context: str, answer: str, *, is_chat: bool) -> Pair:
        """Return the tokens of a context and of an answer behind it.

        White space between them is the answer's, as in lm-eval. The context's tokens are those that
        it has alone, whatever a tokenizer would merge across the border: generation would never
        see the merged token.
        """
        bare = context.rstrip()
        answer = context[len(bare) :] + answer
        if not bare:
            return self._plain_text.split(answer)
        joined = self._segments.encode([Segment(text=bare), Segment(text=answer, learnt=True)])
        return self.context(bare, is_chat=is_chat), joined.ids[joined.prompt :]

    def windows(self, text: str) -> Iterator[Pair]:
        """Yield windows of a text in which every token is predicted once, as lm-eval cuts them.

        Each is begun as the tokenizer begins a text; the last one sees as much as it can.
        """
        begin, ids = self._plain_text.split(text)
        start = list(self._plain_text.start)
        size, end = self._max_length - len(start), self._max_length + 1 - len(begin)
        if size < 1:
            raise ConfigError(
                f"--max_length {self._max_length} leaves no room for a text behind the "
                f"{len(start)} token(s) that the tokenizer begins it with"
            )
        if ids:
            yield begin, ids[:end]
        for first in range(end, len(ids), size):
            last = min(first + size, len(ids))
            yield [*start, *ids[last - size - 1 : first]], ids[first:last]

    def cut(self, ids: Sequence[int], length: int) -> list[int]:
        """Return the last `length` tokens, behind those that the text was begun with, by the
        tokenizer or by a chat template: some models cannot do without their begin token."""
        kept = self._kept
        if len(ids) <= length or length <= len(kept) or list(ids[: len(kept)]) != kept:
            return list(ids[-length:])
        return [*kept, *ids[len(ids) - length + len(kept) :]]
