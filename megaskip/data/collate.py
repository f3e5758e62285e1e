"""Rows side by side in one batch of tensors. Knows rows, not where they come from."""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megaskip.data.row import AnyRow
from megaskip.labels import IGNORED
from megaskip.routing.copies import copy_to


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCounts:
    """How much a batch holds, as numbers of the host: reading them off a GPU would wait for it.

    Of ranks that share the tokens of rows, the first one counts rows and samples.
    """

    rows: int
    """With a real token in them."""
    samples: int
    """Segments of packed rows; rows otherwise."""
    segments: int
    """The most that a row has; 1 when no row is packed."""
    tokens: int
    """Real ones."""
    supervised: int
    """Labels that are predicted; the first of a row never is."""
    longest: int
    """Tokens of the longest stretch of rising positions: a sample of packed rows, their padding, or
    a whole row."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What one forward pass reads; every tensor is [rows, tokens], padded on the right.

    What follows from the tensors is found when the batch is made, on the CPU where they are there.
    """

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
    row_numbers: tuple[int, ...] | None = None
    """Of each row in the loader's data; () of what stands for no row, None where it is unknown."""
    row_tokens: torch.Tensor | None = None
    """int64 [rows]: real tokens of the whole rows; None where this batch holds whole rows."""
    row_prompts: torch.Tensor | None = None
    """int64 [rows]: tokens of `prompt_mask` in the whole rows; None where it holds whole rows."""
    predicting: torch.Tensor = field(init=False)
    """int64 [supervised]: the tokens, numbered through all rows, that predict a label."""
    targets: torch.Tensor = field(init=False)
    """int64 [supervised]: the labels that they predict."""
    bounds: torch.Tensor | None = field(init=False)
    """int32 [n + 1]: where samples and padding of packed rows begin, numbered through all rows, and
    the number of tokens; None when no row is packed."""
    counts: BatchCounts = field(init=False)

    def __post_init__(self) -> None:
        supervised = torch.nn.functional.pad(self.labels[:, 1:] != IGNORED, (0, 1))
        predicting = supervised.flatten().nonzero().squeeze(1)
        object.__setattr__(self, "predicting", predicting)
        object.__setattr__(self, "targets", self.labels.flatten()[predicting + 1])
        object.__setattr__(self, "bounds", None if self.segment_ids is None else self._bounds())
        object.__setattr__(self, "counts", self._count())

    def _bounds(self) -> torch.Tensor:
        begins = (self.position_ids.flatten() == 0).nonzero().squeeze(1)
        return torch.nn.functional.pad(begins, (0, 1), value=self.input_ids.numel()).int()

    def _count(self) -> BatchCounts:
        rows = int(self.token_mask.any(dim=1).sum())
        packed = None if self.segment_ids is None else self.segment_ids.amax(dim=1) + 1
        longest = self.input_ids.shape[1] if self.bounds is None else int(self.bounds.diff().max())
        return BatchCounts(
            rows=rows,
            samples=rows if packed is None else int(packed.sum()),
            segments=1 if packed is None else max(int(packed.max()), 1),
            tokens=int(self.token_mask.sum()),
            supervised=len(self.predicting),
            longest=longest,
        )

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """The 2-D int64 mask for HF models; None for packed rows, which it would merge.

        Most decoders do without: see megaskip/arch/padding.py.
        """
        # HF 5.23 reads segments off position_ids only while attention_mask is None
        # (masking_utils._preprocess_mask_arguments; transformers#46634).
        return None if self.segment_ids is not None else self.token_mask.long()

    @property
    def lengths(self) -> dict[str, Any]:
        """What flash attention is told of packed rows, as transformers names it; empty for others.

        With it samples of all rows are attended to one by one, without a mask
        (FlashAttentionKwargs in transformers' modeling_flash_attention_utils.py)."""
        if self.bounds is None:
            return {}
        bounds, longest = self.bounds, self.counts.longest
        return {
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def share_of_tokens(self, rank: int, size: int) -> "Batch":
        """Return the share of number `rank` of `size` ranks that hold the tokens of these rows
        together, each as many neighbouring columns; itself for one.

        A token at the end of a share predicts the first label of the next one. Shares add up to the
        whole rows, which are not packed, in what they supervise and count.
        """
        if size == 1:
            return self
        assert self.segment_ids is None, "packed rows are not shared"
        tokens = self.input_ids.shape[1]
        assert tokens % size == 0, f"{tokens} tokens for {size} ranks"
        width = tokens // size
        columns = slice(rank * width, (rank + 1) * width)
        names = ("input_ids", "labels", "token_mask", "prompt_mask", "position_ids")
        share = Batch(
            **{name: getattr(self, name)[:, columns].contiguous() for name in names},
            row_numbers=self.row_numbers,
            row_tokens=self.token_mask.sum(dim=1),
            row_prompts=(self.prompt_mask & self.token_mask).sum(dim=1),
        )
        row, column = self.predicting // tokens, self.predicting % tokens
        here = column // width == rank
        predicting = (row * width + column % width)[here]
        counted = self.counts if rank == 0 else dataclasses.replace(self.counts, rows=0, samples=0)
        counts = dataclasses.replace(
            counted, tokens=share.counts.tokens, supervised=len(predicting), longest=width
        )
        derived = {"predicting": predicting, "targets": self.targets[here], "counts": counts}
        for name, value in derived.items():
            object.__setattr__(share, name, value)
        return share

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device; a GPU is not waited for."""
        moved = copy.copy(self)
        for name in (item.name for item in dataclasses.fields(self)):
            tensor = getattr(self, name)
            if isinstance(tensor, torch.Tensor):
                object.__setattr__(moved, name, copy_to(tensor, device))
        return moved


def collate(
    rows: Sequence[AnyRow],
    *,
    pad_token_id: int,
    prompt_tokens: int,
    pad_to_multiple: int = 8,
    row_numbers: Sequence[int] | None = None,
) -> Batch:
    """Return rows, packed or not, as one batch, as long as the longest row, rounded up;
    `row_numbers` as in Batch."""
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
        row_numbers=None if row_numbers is None else tuple(row_numbers),
    )


def placeholder_batch(device: torch.device, *, rank: int = 0, size: int = 1) -> Batch:
    """Return a batch of one row without any label, or the share of its tokens that rank `rank` of
    `size` has: what a rank runs that has no batch left, so that it takes part in the collectives of
    a forward pass."""
    ids = torch.zeros(1, 8 * size, dtype=torch.int64)
    real = torch.ones_like(ids, dtype=torch.bool)
    batch = Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORED),
        token_mask=real,
        prompt_mask=real,
        position_ids=torch.arange(8 * size).unsqueeze(0),
        row_numbers=(),
    )
    return batch.share_of_tokens(rank, size).to(device)
