"""lm-eval's HFLM whose requests become tokens as in training, or as lm-eval makes them. Knows
tokens, not how a model is run."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megaskip.data.request_encoder import Pair, RequestEncoder
from megaskip.data.vocabulary import padding_token, require_known_token
from megaskip.errors import DataError
from megaskip.extras import extra

with extra("eval"):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


class EncodingLM(HFLM):
    """HFLM with the tokens of training: one begin token, no end token behind a context.

    lm-eval 0.4.13 itself begins a text of `loglikelihood_rolling` with two begin tokens, leaves the
    end token of an `add_eos_token` tokenizer behind a context, adds a begin token to chats whose
    template has none, and cuts the begin token off where a context is too long.
    """

    def __init__(self, *, lm_eval_compatible: bool = False, **options: Any) -> None:
        """With `lm_eval_compatible` tokens are lm-eval's; `options` are HFLM's."""
        super().__init__(**options)
        self.lm_eval_compatible = lm_eval_compatible
        self.asks_in_chat = False
        """Whether contexts are chats: lm-eval has asked for their template."""
        self._encoder = RequestEncoder(self.tokenizer, self.max_length)
        self._vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        self._pad_token_id = padding_token(self.tokenizer, self._vocabulary)

    def apply_chat_template(self, *args: Any, **options: Any) -> Any:
        """Return a chat as text; from now on contexts are taken for such texts."""
        self.asks_in_chat = True
        return super().apply_chat_template(*args, **options)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval's own report says of the model, and whose tokens it was given."""
        return {**super().get_model_info(), "lm_eval_compatible": self.lm_eval_compatible}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return (log-probability, is greedy) of each answer behind its context."""
        if self.lm_eval_compatible:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        pairs = [self._encoder.pair(*r.args, is_chat=self.asks_in_chat) for r in requests]
        asked = [(r.args, *pair) for r, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def tok_encode(self, string: str, *args: Any, **options: Any) -> Any:
        """Return the tokens of a context."""
        if self.lm_eval_compatible:
            return super().tok_encode(string, *args, **options)
        return self._encoder.context(string, is_chat=self.asks_in_chat)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return (ids, attention mask), [B, T] of contexts, padded on the left."""
        if self.lm_eval_compatible:
            ids, mask = super().tok_batch_encode(
                strings, padding_side, left_truncate_len, truncation
            )
            return ids.masked_fill(mask == 0, self._pad_token_id), mask
        rows = [self._cut(self.tok_encode(text), left_truncate_len) for text in strings]
        width = max(map(len, rows))
        padded = [[self._pad_token_id] * (width - len(row)) + row for row in rows]
        lengths = torch.tensor([[len(row)] for row in rows])
        return torch.tensor(padded), (torch.arange(width) >= width - lengths).long()

    def _windows(self, text: str) -> Iterator[Pair]:
        """Yield windows of a text in which every token is predicted once."""
        if not self.lm_eval_compatible:
            return self._encoder.windows(text)
        rolling = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, rolling)

    def _cut(self, ids: list[int], length: int | None) -> list[int]:
        """Return the last `length` tokens, or all; without lm-eval a begin token stays."""
        if length is None or len(ids) <= length:
            return ids
        return ids[-length:] if self.lm_eval_compatible else self._encoder.cut(ids, length)

    def _require_known(self, ids: Sequence[int], text: str) -> None:
        """Raise DataError for a text without tokens, and for tokens beyond the embedding."""
        if not ids:
            raise DataError(f"the tokenizer makes no token of {text[-40:]!r}, which a task asks")
        require_known_token(max(ids), self._vocabulary, text=repr(text[-40:]))
