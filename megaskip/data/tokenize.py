"""Samples turned into rows of tokens and labels. Knows templates and lengths, no files."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megaskip.data.formats import Sample
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
        self._tokenizer = tokenizer
        self._seq_length = seq_length
        self._bos = _leading_special_ids(tokenizer)
        self._eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(self, sample: Sample, *, source: int) -> Tokenised:
        """Return the rows of a sample: one per chat, one per window of seq_length of plain text.

        Raises DataError, with the sample's place, where the chat template does not fit.
        """
        ids, learnt = self.encode(sample)
        if not sample.messages:
            return self._windows(ids, source)
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
        text = self._ids(sample.text)
        ids = [*self._with_bos(text), *self._eos] if text else []
        return ids, [True] * len(ids)

    def _is_joined(self, sample: Sample) -> bool:
        return sample.joinable and not self.template.exists

    def _windows(self, ids: list[int], source: int) -> Tokenised:
        windows = [ids[i : i + self._seq_length] for i in range(0, len(ids), self._seq_length)]
        # A window of one token has nothing to predict.
        rows = tuple(
            _row(window, [True] * len(window), source=source, prompt=False)
            for window in windows
            if len(window) > 1
        )
        return Tokenised(rows=rows, dropped=not rows)

    def _join(self, sample: Sample) -> Encoded:
        """Tokenise prompt + completion + end; the prompt's tokens are those of the prompt alone."""
        prompt, completion = (message.content for message in sample.messages)
        first = self._ids(prompt)
        both = self._ids(prompt + completion)
        # Where the two merge, generation would never see the merged token: tokenise them apart.
        rest = both[len(first) :] if both[: len(first)] == first else self._ids(completion)
        head = self._with_bos(first)
        answer = [*rest, *self._eos]
        return head + answer, [False] * len(head) + [True] * len(answer)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Put the begin token first, unless the text itself brings it."""
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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


def _leading_special_ids(tokenizer: Any) -> list[int]:
    """Return the begin token, if the tokenizer puts one before a text by itself."""
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    adds = tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if adds else []
