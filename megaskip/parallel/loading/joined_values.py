"""Proof that weights which transformers joins on loading, such as experts, came from the files.

A joined weight has the rows of what it was joined from, so the beginnings of some stored rows are
looked for among the beginnings of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError
from megaskip.parallel.loading.stored_values import read_block
from megaskip.parallel.loading.weight_plan import WeightPlan

_BEGINNING = 16
"""Elements of a row that are compared."""


def joined_rows(plan: WeightPlan, name: str) -> Iterator[tuple[StoredTensor, int]]:
    """Yield (stored tensor, number of a row) to look for in the joined weight `name`: of the first
    and the last that it is joined from."""
    tensors = plan.joined.get(name, ())
    if tensors:
        yield tensors[0], 0
        yield tensors[-1], tensors[-1].shape[0] - 1


@torch.no_grad()
def holds_row(
    folder: Path, loaded: Tensor, stored: StoredTensor, row: int, *, first: int = 0
) -> bool:
    """Return whether `loaded`, elements of a weight flattened from number `first` on, has a row
    that begins as this one of a stored tensor [rows, D] does."""
    width = stored.shape[1]
    size = min(_BEGINNING, width)
    block = read_block(folder, stored, row * width, size).to(loaded.device, loaded.dtype)
    flat = loaded.detach().reshape(-1)[-first % width :]
    count = (flat.numel() - size) // width + 1 if flat.numel() >= size else 0
    beginnings = flat.as_strided((max(count, 0), size), (width, 1), flat.storage_offset())
    return bool((beginnings == block).all(1).any())


def not_joined(folder: Path, name: str, stored: StoredTensor) -> CheckpointError:
    """Return the error for a joined weight in which rows of the files are not found."""
    return CheckpointError(
        f"{folder}: {name} in memory has no row of {stored.name} of {stored.file}; nothing was "
        "done with it. Was the folder written to while it was read? If not, please report this"
    )
