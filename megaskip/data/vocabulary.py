"""Tokens of a tokenizer that a model has no embedding for: refused in text, replaced in padding."""

from typing import Any

from megaskip.errors import DataError


def require_known_token(largest: int, vocabulary: int, *, text: str = "--data") -> None:
    """Raise DataError when `largest`, the largest token of `text`, is no row of an embedding of
    `vocabulary` rows."""
    if largest >= vocabulary:
        raise DataError(
            f"{text}: token {largest} is beyond the model's vocabulary of {vocabulary}; use the "
            "tokenizer that belongs to the model (--tokenizer)"
        )


def padding_token(tokenizer: Any, vocabulary: int) -> int:
    """Return a token to pad with that a model with an embedding of `vocabulary` rows knows.

    Padding is masked everywhere, so any token does where the tokenizer's own is beyond it.
    """
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary else 0


def has_unknown_tokens(tokenizer: Any, vocabulary: int) -> bool:
    """Return whether the tokenizer knows tokens beyond an embedding of `vocabulary` rows."""
    return bool(max(tokenizer.get_vocab().values(), default=0) >= vocabulary)
