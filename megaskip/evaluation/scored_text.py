"""Texts whose continuations are scored, side by side in one batch. Knows tokens, not tasks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from megaskip.evaluation.runner import TokenBatch

T = TypeVar("T")


@dataclass(kw_only=True)
class ScoredText:
    """One row of the model's input, and the continuations that are asked about it."""

    tokens: tuple[int, ...]
    """What the model reads: the context, and a continuation but for its last token."""
    prompt: int
    """How many of the first tokens a sequence is judged by."""
    length: int
    """Tokens of each continuation: as many last positions predict it."""
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """(number of the request, its continuation)."""

    @property
    def key(self) -> tuple[tuple[int, ...], int, int]:
        """Return what two requests must share to be answered by one row."""
        return self.tokens, self.prompt, self.length

    @property
    def order(self) -> tuple[int, tuple[int, ...], int]:
        """Return the key to sort by: long texts first, so that a batch is of like lengths."""
        return -len(self.tokens), self.tokens, self.prompt


def token_batch(
    texts: Sequence[ScoredText], *, pad_token_id: int, device: torch.device
) -> TokenBatch:
    """Return texts as rows of one batch, padded on the right."""
    width = max(len(text.tokens) for text in texts)
    position = torch.arange(width)
    lengths = torch.tensor([[len(text.tokens)] for text in texts])
    prompts = torch.tensor([[text.prompt] for text in texts])
    ids = [[*text.tokens, *[pad_token_id] * (width - len(text.tokens))] for text in texts]
    return TokenBatch(
        input_ids=torch.tensor(ids, device=device),
        token_mask=(position < lengths).to(device),
        prompt_mask=(position < prompts).to(device),
        last=width - min(len(text.tokens) - text.length for text in texts),
    )


def chunks(items: list[T], size: int) -> Iterator[list[T]]:
    """Yield `items` in lists of `size`, in order; the last one may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
