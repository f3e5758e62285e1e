"""Plain text as token ids, the same in training and evaluation: what the tokenizer puts in front of
a text, once, and nothing behind it. Knows no templates and no lengths."""

from collections.abc import Sequence
from typing import Any

from megaskip.config.value_types import shown
from megaskip.errors import DataError


class UnreadableTextError(DataError):
    """A text that a tokenizer has no tokens for."""


class PlainTextEncoder:
    """Encodes texts with one tokenizer, whichever special tokens that adds by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start = _start(tokenizer)
        """What the tokenizer puts in front of a text: nothing, a begin token, or several tokens."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, begun as the tokenizer begins one."""
        return self.started(self.ids(text))

    def started(self, ids: Sequence[int]) -> list[int]:
        """Return `ids` behind the start, of which they may bring the end or all themselves."""
        return [*self.start, *_behind(self.start, ids)]

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """Return (what the first token of a text is predicted from, the tokens of the text).

        Where the tokenizer puts nothing in front of a text, that is its begin token, or its end
        token where it has none (as in lm-eval). Raises DataError where it has neither.
        """
        begin = self.start or self._begin()
        return list(begin), _behind(begin, self.ids(text))

    def _begin(self) -> tuple[int, ...]:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return (token,)
        raise DataError("the tokenizer has no token to begin a text with, neither bos nor eos")

    def ids(self, text: str) -> list[int]:
        """Return the ids of the text alone. Special tokens that it spells out are special."""
        return token_ids(self._tokenizer, text)


def token_ids(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Return the ids of a text, with `special` between what the tokenizer puts around it; raises
    UnreadableTextError for a text that it has no tokens for."""
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:
        # The tokenizers library has a bare Exception for what is unknown without a token for that.
        if type(error) is not Exception:
            raise
        raise UnreadableTextError(
            f"the tokenizer cannot read {shown(text)} ({error}); expected a token for what is "
            "unknown. Name another --tokenizer, or leave such text out"
        ) from None


def _behind(start: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return `ids` without their longest beginning with which `start` ends."""
    for length in range(len(start), 0, -1):
        if list(ids[:length]) == list(start[-length:]):
            return list(ids[length:])
    return list(ids)


def _start(tokenizer: Any) -> tuple[int, ...]:
    try:
        whole, alone = token_ids(tokenizer, "a", special=True), token_ids(tokenizer, "a")
    except UnreadableTextError:
        whole, alone = token_ids(tokenizer, "", special=True), []
    if not alone:  # a vocabulary without this letter
        begins = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id]
        return tuple(whole[:1]) if begins else ()
    for length in range(len(whole)):
        if whole[length : length + len(alone)] == alone:
            return tuple(whole[:length])
    return ()
