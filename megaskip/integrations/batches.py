"""What routers must know about a batch, read off the inputs that data collators make.

Shapes: B rows, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaskip.errors import DataError
from megaskip.labels import IGNORED


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMasks:
    """The arguments of RouterSet.set_batch."""

    token_mask: Tensor
    """bool [B, T]: real tokens."""
    prompt_mask: Tensor
    """bool [B, T]: the tokens that a sequence is judged by under pool="prompt"."""
    segment_ids: Tensor | None
    """int64 [B, T]: which sample of a packed row a token is from; None when rows are not packed."""


def describe_inputs(inputs: Mapping[str, Any], *, prompt_tokens: int) -> BatchMasks:
    """Return the masks of a batch of input_ids [B, T] with, where present, attention_mask,
    position_ids and labels of the same shape.

    The prompt of a sample is what comes before its first label (labels are not shifted, -100 has no
    loss). A sample without a prompt, as plain text is, is judged by its first `prompt_tokens`
    tokens, and one of a batch without labels by all of them. Without an attention_mask,
    position_ids that begin anew within a row separate the samples of a packed row. Raises DataError
    for inputs without input_ids.
    """
    if "input_ids" not in inputs:
        raise DataError(
            f"the batch holds {', '.join(sorted(inputs)) or 'nothing'}; routers need input_ids to "
            "tell its rows and tokens"
        )
    input_ids: Tensor = inputs["input_ids"]
    attention_mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if attention_mask is None:
        segment_ids = _segments(inputs.get("position_ids"), input_ids)
        everything = torch.ones_like(input_ids, dtype=torch.bool)
        token_mask = everything if segment_ids is None else segment_ids >= 0
    else:
        token_mask, segment_ids = attention_mask.bool(), None
    if labels is None:
        return BatchMasks(token_mask=token_mask, prompt_mask=token_mask, segment_ids=segment_ids)
    supervised = token_mask & (labels != IGNORED)
    starts = _starts(token_mask, segment_ids)
    prompt = token_mask & (_count_since(supervised, starts) == 0)
    lengths = _per_segment(prompt, starts)
    # The first token never has a loss, so a prompt of one token is none.
    has_prompt = lengths > 1
    first_tokens = token_mask & (_count_since(token_mask, starts) <= prompt_tokens)
    prompt_mask = torch.where(has_prompt, prompt, first_tokens)
    return BatchMasks(token_mask=token_mask, prompt_mask=prompt_mask, segment_ids=segment_ids)


def _segments(position_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Return int64 [B, T], the number of each token's sample in its row, -1 for padding; None where
    every row is one sample."""
    if position_ids is None or position_ids.shape != input_ids.shape:
        return None
    begins = position_ids == 0
    if not bool(begins[:, 1:].any()):
        return None
    # Collators pad positions with zeros, so padding looks like samples of one token.
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], dim=1)
    is_padding = begins & ends
    number = (begins & ~is_padding).long().cumsum(dim=1) - 1
    return number.masked_fill(is_padding, -1)


def _starts(token_mask: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Return bool [B, T]: where a sample begins, at the first token of each row at the latest."""
    starts = torch.zeros_like(token_mask)
    starts[:, 0] = True
    if segment_ids is not None:
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def _count_since(marked: Tensor, starts: Tensor) -> Tensor:
    """Return int64 [B, T]: how many tokens of the same sample are `marked`, up to each token."""
    counts = marked.long().cumsum(dim=1)
    before = counts - marked.long()
    # Counts never fall, so the largest value at a start so far is that of the last start.
    return counts - torch.where(starts, before, torch.zeros_like(before)).cummax(dim=1).values


def _per_segment(marked: Tensor, starts: Tensor) -> Tensor:
    """Return int64 [B, T]: how many tokens of its sample are `marked`, at each token of it."""
    index = starts.long().cumsum(dim=1) - 1
    totals = torch.zeros_like(index).scatter_add_(1, index, marked.long())
    return totals.gather(1, index)
