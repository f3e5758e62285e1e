"""Rows side by side in one batch of tensors. Knows rows, not where they come from."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megaskip.data.row import AnyRow
from megaskip.labels import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one forward pass reads; every tensor is [rows, tokens], padded on the right."""

    input_ids: torch.Tensor
    """int64."""
    labels: torch.Tensor
    """int64, not shifted; IGNORED (-100) where there is no loss."""
    token_mask: torch.Tensor
    """bool: real tokens."""
    prompt_mask: torch.Tensor
    """bool: what a sequence router pools over, the prompt of each sample; of a sample without one,
    its first `prompt_tokens` tokens."""
    position_ids: torch.Tensor
    """int64: the columns; in packed rows it restarts at each sample, and where padding begins."""
    segment_ids: torch.Tensor | None = None
    """int64: which sample of the row a token is from, padding -1; None when no row is packed."""

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The 2-D int64 mask for HF models; None for packed rows, which it would merge.

        Most decoders do without: see megaskip/arch/padding.py.
        """
        # HF 5.23 reads segments off position_ids only while attention_mask is None
        # (masking_utils._preprocess_mask_arguments; transformers#46634).
        return None if self.segment_ids is not None else self.token_mask.long()

    def num_supervised(self) -> int:
        """Return how many labels are predicted; the first of a row never is."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: t.to(device) for name, t in tensors.items() if t is not None}
        return dataclasses.replace(self, **moved)


def collate(
    rows: Sequence[AnyRow], *, pad_token_id: int, prompt_tokens: int, pad_to_multiple: int = 8
) -> Batch:
    """Return rows, packed or not, as one batch, as long as the longest row, rounded up."""
    longest = max(map(len, rows))
    shape = (len(rows), -(-longest // pad_to_multiple) * pad_to_multiple)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    prompt_mask = np.zeros(shape, dtype=bool)
    segment_ids = np.full(shape, -1, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    packed = any(row.packed for row in rows)
    for b, row in enumerate(rows):
        start = 0
        for number, segment in enumerate(row.segments):
            end = start + len(segment)
            input_ids[b, start:end] = segment.input_ids
            labels[b, start:end] = segment.labels
            prompt_mask[b, start : start + segment.num_pooled(prompt_tokens)] = True
            segment_ids[b, start:end] = number
            position_ids[b, start:end] = np.arange(end - start)
            start = end
        # Padding of packed rows is a segment of its own. That of others goes on counting: positions
        # that restart would make transformers take the row for a packed one.
        position_ids[b, start:] = np.arange(shape[1] - start) + (0 if packed else start)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        token_mask=torch.from_numpy(segment_ids >= 0),
        prompt_mask=torch.from_numpy(prompt_mask),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids) if packed else None,
    )
