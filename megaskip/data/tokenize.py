"""Samples turned into rows of tokens and labels. Knows templates and lengths, no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megaskip.data.answers import AnswerFinder
from megaskip.data.formats import Sample
from megaskip.data.plain_text import PlainTextEncoder, UnreadableTextError
from megaskip.data.row import Row
from megaskip.data.segments import Encoded, Segment, SegmentTokenizer
from megaskip.data.template import ChatTemplate
from megaskip.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenised:
    """What became of one sample: its rows, and what was lost."""

    rows: tuple[Row, ...]
    truncated: bool = False
    """The end was cut off at seq_length."""
    dropped: bool = False
    """Nothing was left to learn, so there is no row."""


class SampleTokenizer:
    """Tokenises samples with one tokenizer, template and seq_length."""

    def __init__(
        self, tokenizer: Any, *, seq_length: int, template_file: str | None = None
    ) -> None:
        self.template = ChatTemplate(tokenizer, template_file=template_file)
        self._plain_text = PlainTextEncoder(tokenizer)
        self._segments = SegmentTokenizer(tokenizer)
        self._seq_length = seq_length
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(self, sample: Sample, *, source: int) -> Tokenised:
        """Return the rows of a sample: one per chat (one per answer where the template rewrites
        earlier turns), one per window of seq_length of plain text.

        Raises DataError, with the sample's place, where the chat template does not fit, or the
        tokenizer has no tokens for a text.
        """
        try:
            encoded = self.encode(sample)
        except UnreadableTextError as error:
            raise DataError(f"{sample.place}: {error}") from None
        if not sample.messages:
            return self._windows(encoded[0], source)
        truncated = any(len(row.ids) > self._seq_length for row in encoded)
        kept = [row for row in encoded if self.is_learnt(row)]
        rows = tuple(self._row(row, source) for row in kept)
        return Tokenised(rows=rows, truncated=truncated, dropped=not rows)

    def encode(self, sample: Sample) -> list[Encoded]:
        """Return the tokens of each row of a sample before anything is cut off at seq_length; plain
        text is one row here."""
        if sample.messages:
            if self._is_joined(sample):
                return [self._join(sample)]
            finder = AnswerFinder(self.template.open(sample), self._segments)
            return [self._segments.encode(row) for row in finder.rows()]
        if not self._plain_text.ids(sample.text):
            return [Encoded(ids=[], learnt=[])]
        ids = [*self._plain_text.encode(sample.text), *self._eos]
        start = len(self._plain_text.start)
        return [Encoded(ids=ids, learnt=[index >= start for index in range(len(ids))])]

    def is_learnt(self, row: Encoded) -> bool:
        """Return whether something of a row is learnt within seq_length: else it is dropped."""
        return any(row.learnt[1 : self._seq_length])

    def _is_joined(self, sample: Sample) -> bool:
        return sample.joinable and not self.template.exists

    def _windows(self, text: Encoded, source: int) -> Tokenised:
        starts = range(0, len(text.ids), self._seq_length)
        windows = [slice(start, start + self._seq_length) for start in starts]
        # A window of one token has nothing to predict.
        rows = tuple(
            self._row(Encoded(ids=text.ids[window], learnt=text.learnt[window]), source)
            for window in windows
            if len(text.ids[window]) > 1
        )
        return Tokenised(rows=rows, dropped=not rows)

    def _join(self, sample: Sample) -> Encoded:
        """Tokenise prompt + completion + end; an empty prompt is none."""
        prompt, completion = (message.content for message in sample.messages)
        segments = Segment(text=prompt), Segment(text=completion, learnt=True)
        joined = self._segments.encode(segments)
        head = self._plain_text.started(joined.ids[: joined.prompt])
        answer = [*joined.ids[joined.prompt :], *self._eos]
        return Encoded(
            ids=head + answer,
            learnt=[False] * len(head) + [True] * len(answer),
            prompt=len(head) if prompt else 0,
        )

    def _row(self, encoded: Encoded, source: int) -> Row:
        supervised = np.array(encoded.learnt[: self._seq_length], dtype=bool)
        supervised[:1] = False
        return Row(
            input_ids=np.array(encoded.ids[: self._seq_length], dtype=np.int32),
            supervised=supervised,
            prompt_length=min(encoded.prompt, len(supervised)),
            source=source,
        )
