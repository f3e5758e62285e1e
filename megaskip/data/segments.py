"""Tokens of a text in segments, whose borders no token crosses. Knows tokenizers, no templates."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megaskip.data.plain_text import UnreadableTextError, token_ids

_CONTROL = re.compile(r"<\|[^|<>\s]+\|>")
_CONTEXT = 512
"""Characters before a border that may decide how the text behind it becomes tokens."""
_ANCHORS = ("\n", "a", ".", "0", "_", ">", "|")
"""Texts to put before a segment so that it is not tokenised as the beginning of a text, where
SentencePiece adds a space; the first that does not merge with the segment is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A stretch of text that is learnt as a whole, or not at all."""

    text: str
    learnt: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """The tokens of a row before anything is cut off at seq_length."""

    ids: list[int]
    learnt: list[bool]
    """For each token, whether the model learns to predict it."""
    prompt: int = 0
    """How many of the first tokens are the prompt, as generation would feed it; 0 without one."""


class SegmentTokenizer:
    """Tokenises segment by segment: a token belongs to one segment, whatever the tokenizer merges.

    The first segment is tokenised as generation tokenises a prompt. A later segment gets the tokens
    that it has in the whole text where the tokenizer itself ends a token at its border, as it
    nearly always does, and is tokenised by itself where it does not.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown = tokenizer.unk_token_id
        added = tokenizer.added_tokens_decoder.values()
        self.special = {str(token) for token in added if token.special}
        """Special tokens as text; a tokenizer splits a text at them before anything else."""
        self.special |= set(tokenizer.all_special_tokens)
        # SentencePiece knows control tokens as pieces that its user defined.
        self.special |= {t for t in tokenizer.get_vocab() if _CONTROL.fullmatch(t)}
        self._swallowing = {str(token) for token in added if token.rstrip}
        self._special_pattern = re.compile(
            "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)"
        )

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without what the tokenizer puts around a text by itself."""
        return token_ids(self._tokenizer, text)

    def first_special(self, text: str) -> re.Match[str] | None:
        """Return the first special token in `text`, or None."""
        return self._special_pattern.search(text)

    def last_special(self, text: str) -> re.Match[str] | None:
        """Return the last special token in `text`, or None."""
        last = deque(self._special_pattern.finditer(text), maxlen=1)
        return last[0] if last else None

    def encode(self, segments: Sequence[Segment]) -> Encoded:
        """Return the tokens of segments, the first of which is the prompt."""
        prompt, *others = segments
        text, ids = prompt.text, self.ids(prompt.text)
        learnt, length = [prompt.learnt] * len(ids), len(ids)
        for segment in others:
            more = self._continuation(text, segment)
            ids += more
            learnt += [segment.learnt] * len(more)
            text += segment.text
        return Encoded(ids=ids, learnt=learnt, prompt=length)

    def _continuation(self, before: str, segment: Segment) -> list[int]:
        """Return the tokens of a segment behind the text `before`, no character more or less."""
        if not before or not segment.text:
            return self.ids(segment.text)
        for anchor in self._anchors(before, segment):
            try:
                head, both = self.ids(anchor), self.ids(anchor + segment.text)
            except UnreadableTextError:  # of the anchor, which is not of the data
                continue
            # Neighbouring unknown characters may become one unknown token.
            if head and both[: len(head)] == head and head[-1] != self._unknown:
                return both[len(head) :]
        return self.ids(segment.text)

    def _anchors(self, before: str, segment: Segment) -> Iterator[str]:
        """Yield texts to tokenise a segment behind, what really stands before it first."""
        near = before[-_CONTEXT:]
        special = self.last_special(near)
        stripped = near.rstrip()
        # Some special tokens take white space behind them along, which may be the answer's.
        swallows = any(stripped.endswith(token) for token in self._swallowing)
        if not (segment.learnt and segment.text[:1].isspace() and swallows):
            yield near[special.start() :] if special else near
        yield from _ANCHORS
