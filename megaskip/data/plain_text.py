"""Plain text as token ids, the same in training and evaluation: what the tokenizer puts in front of
a text, once, and nothing behind it. Knows no templates and no lengths."""

from collections.abc import Sequence
from typing import Any


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
        """Return `ids` behind the start, unless they bring it themselves."""
        length = len(self.start)
        return list(ids) if tuple(ids[:length]) == self.start else [*self.start, *ids]

    def ids(self, text: str) -> list[int]:
        """Return the ids of the text alone. Special tokens that it spells out are special."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(tokenizer: Any) -> tuple[int, ...]:
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    alone = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    if not alone:  # a vocabulary without this letter
        begins = tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id]
        return tuple(whole[:1]) if begins else ()
    for length in range(len(whole)):
        if whole[length : length + len(alone)] == alone:
            return tuple(whole[:length])
    return ()
