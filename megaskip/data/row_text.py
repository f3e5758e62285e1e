"""The tokens of a row as text, in spans of what a router reads, what is learnt, what is cut."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from megaskip.config import DataConfig
from megaskip.data.formats import Sample
from megaskip.data.inspect import InspectedRow
from megaskip.data.plain_text import token_ids
from megaskip.data.tokenize import SampleTokenizer

PROMPT = "prompt"
"""Read by a sequence router with pool=prompt; not learnt."""
PROMPT_LEARNT = "prompt, LEARNT"
"""Both, as at the beginning of plain text."""
LEARNT = "LEARNT"
CONTEXT = "context"
"""Seen by the model, but neither learnt nor read by such a router: later questions, for example."""
CUT = "cut off"
"""Beyond seq_length: the model never sees it."""
CUT_ANSWER = "cut off, ANSWER"
"""Would be learnt if seq_length were larger."""

Piece = tuple[str, bool]
"""Some text, and whether it is one special token rather than ordinary text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Neighbouring tokens that are treated alike."""

    kind: str
    start: int
    end: int
    """Tokens start to end - 1 of the row."""
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowText:
    """A row as a reader sees it."""

    ids: tuple[int, ...]
    """All tokens of the row, those that are cut off too."""
    spans: tuple[Span, ...]
    length: int
    """Tokens that are left after the cut."""

    @property
    def kept(self) -> tuple[Span, ...]:
        """The spans that the model sees."""
        return tuple(span for span in self.spans if span.kind not in (CUT, CUT_ANSWER))

    @property
    def cut(self) -> tuple[Span, ...]:
        """The spans beyond seq_length."""
        return tuple(span for span in self.spans if span.kind in (CUT, CUT_ANSWER))

    def text(self, *kinds: str) -> str:
        """Return the text of all spans of these kinds, one after the other."""
        return "".join(span.text for span in self.spans if span.kind in kinds)

    def answers(self) -> list[str]:
        """Return the text of every unbroken stretch of learnt tokens."""
        kinds = (LEARNT, PROMPT_LEARNT)
        stretches = groupby(self.spans, key=lambda span: span.kind in kinds)
        return ["".join(span.text for span in spans) for learnt, spans in stretches if learnt]

    def count(self, *kinds: str) -> int:
        """Return how many tokens are of these kinds."""
        return sum(span.end - span.start for span in self.spans if span.kind in kinds)


class RowReader:
    """Turns rows back into text, special tokens included."""

    def __init__(
        self, tokenizer: Any, sample_tokenizer: SampleTokenizer, config: DataConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._sample_tokenizer = sample_tokenizer
        self._seq_length = config.seq_length
        self._prompt_tokens = config.prompt_tokens
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        # Some tokenizers hold runs of spaces as added tokens, which are ordinary text.
        self._special = {i for i, text in added.items() if text.strip()}
        self._special |= set(tokenizer.all_special_ids)
        ids = token_ids(tokenizer, "a", special=True)
        self.prefix = tuple(takewhile(lambda token: token in self._special, ids))
        """Special tokens that the tokenizer puts before a text by itself."""

    def read(self, inspected: InspectedRow) -> RowText | None:
        """Return the text of a row; None for one that never became tokens."""
        sample = inspected.parsed.sample
        if inspected.error is not None or not isinstance(sample, Sample):
            return None
        if inspected.row is not None and not inspected.truncated:
            ids, kinds = inspected.row.input_ids.tolist(), self._kinds(inspected)
        else:
            rows = self._sample_tokenizer.encode(sample)
            learnt_rows = [row for row in rows if self._sample_tokenizer.is_learnt(row)]
            whole = (learnt_rows or rows)[inspected.window - 1]
            ids = whole.ids
            kinds = self._kinds(inspected) or [CONTEXT] * min(len(ids), self._seq_length)
            kinds += [CUT_ANSWER if answer else CUT for answer in whole.learnt[len(kinds) :]]
        return RowText(
            ids=tuple(ids),
            spans=tuple(self._spans(ids, kinds)),
            length=min(len(ids), self._seq_length),
        )

    def border(self, ids: Sequence[int], at: int) -> tuple[list[Piece], list[Piece]]:
        """Return the single tokens before and behind the beginning of token `at`, 3 of each."""
        before, behind = ids[max(at - 3, 0) : at], ids[at : at + 3]
        return [self.token(i) for i in before], [self.token(i) for i in behind]

    def token(self, token: int) -> Piece:
        """Return one token alone."""
        return self._decode([token]), token in self._special

    def _kinds(self, inspected: InspectedRow) -> list[str]:
        """Return the kind of each token that is left after the cut."""
        row = inspected.row
        if row is None:
            return []
        pooled, context = row.num_pooled(self._prompt_tokens), (PROMPT, CONTEXT)
        learnt = (PROMPT_LEARNT, LEARNT)
        return [
            (learnt if supervised else context)[index >= pooled]
            for index, supervised in enumerate(row.supervised.tolist())
        ]

    def _spans(self, ids: Sequence[int], kinds: Sequence[str]) -> Iterator[Span]:
        start = 0
        for kind, run in groupby(kinds):
            end = start + len(list(run))
            pieces = tuple(self._pieces(ids, start, end))
            yield Span(kind=kind, start=start, end=end, pieces=pieces)
            start = end

    def _pieces(self, ids: Sequence[int], start: int, end: int) -> Iterator[Piece]:
        for special, run in groupby(range(start, end), key=lambda i: ids[i] in self._special):
            indices = list(run)
            if special:
                yield from ((self._decode([ids[i]]), True) for i in indices)
            else:
                yield self._stretch(ids, indices[0], indices[-1] + 1), False

    def _stretch(self, ids: Sequence[int], start: int, end: int) -> str:
        """Decode ordinary tokens as they read behind the token before them: SentencePiece leaves
        out the space in front of a text."""
        before = list(ids[max(start - 1, 0) : start])
        prefix = self._decode(before)
        text = self._decode([*before, *ids[start:end]])
        return text[len(prefix) :] if text.startswith(prefix) else self._decode(ids[start:end])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
