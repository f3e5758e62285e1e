"""Samples turned into rows of tokens and labels. Knows templates and lengths, no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megaskip.data.formats import Sample
from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.row import Row
from megaskip.data.template import ChatTemplate, Encoded


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
        self._seq_length = seq_length
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(self, sample: Sample, *, source: int) -> Tokenised:
        """Return the rows of a sample: one per chat, one per window of seq_length of plain text.

        Raises DataError, with the sample's place, where the chat template does not fit.
        """
        ids, learnt = self.encode(sample)
        if not sample.messages:
            return self._windows(ids, learnt, source)
        truncated = len(ids) > self._seq_length
        row = _row(
            ids[: self._seq_length],
            learnt[: self._seq_length],
            source=source,
            prompt=not self._is_joined(sample) or bool(sample.messages[0].content),
        )
        if not row.supervised.any():
            return Tokenised(rows=(), truncated=truncated, dropped=True)
        return Tokenised(rows=(row,), truncated=truncated)

    def encode(self, sample: Sample) -> Encoded:
        """Return all tokens of a sample, before anything is cut off or split at seq_length."""
        if sample.messages:
            joined = self._is_joined(sample)
            return self._join(sample) if joined else self.template.encode(sample)
        if not self._plain_text.ids(sample.text):
            return [], []
        ids = [*self._plain_text.encode(sample.text), *self._eos]
        start = len(self._plain_text.start)
        return ids, [index >= start for index in range(len(ids))]

    def _is_joined(self, sample: Sample) -> bool:
        return sample.joinable and not self.template.exists

    def _windows(self, ids: list[int], learnt: list[bool], source: int) -> Tokenised:
        windows = [slice(i, i + self._seq_length) for i in range(0, len(ids), self._seq_length)]
        # A window of one token has nothing to predict.
        rows = tuple(
            _row(ids[window], learnt[window], source=source, prompt=False)
            for window in windows
            if len(ids[window]) > 1
        )
        return Tokenised(rows=rows, dropped=not rows)

    def _join(self, sample: Sample) -> Encoded:
        """Tokenise prompt + completion + end; the prompt's tokens are those of the prompt alone."""
        prompt, completion = (message.content for message in sample.messages)
        encode = self._plain_text.ids
        first, both = encode(prompt), encode(prompt + completion)
        # Where the two merge, generation would never see the merged token: tokenise them apart.
        rest = both[len(first) :] if both[: len(first)] == first else encode(completion)
        head = self._plain_text.started(first)
        answer = [*rest, *self._eos]
        return head + answer, [False] * len(head) + [True] * len(answer)


def _row(ids: list[int], learnt: list[bool], *, source: int, prompt: bool = True) -> Row:
    supervised = np.array(learnt, dtype=bool)
    supervised[:1] = False
    length = int(np.argmax(supervised)) if prompt and supervised.any() else 0
    return Row(
        input_ids=np.array(ids, dtype=np.int32),
        supervised=supervised,
        prompt_length=length,
        source=source,
    )
