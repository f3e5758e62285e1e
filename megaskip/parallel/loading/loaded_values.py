"""Proof that loaded weights are those of the files: blocks of every tensor against its bytes.

A block costs a few bytes of reading, so it is done at any size of the model, on every rank for what
it holds.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError
from megaskip.parallel.loading.joined_values import holds_row, joined_rows, not_joined
from megaskip.parallel.loading.stored_values import read_block
from megaskip.parallel.loading.weight_plan import WeightPlan

_BLOCKS = 3
_BLOCK = 16
"""Elements of a block."""


def require_loaded(folder: Path, plan: WeightPlan, model: nn.Module) -> None:
    """Raise CheckpointError unless the weights of `model`, whole and by its own names, are those of
    the files in `folder`."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        require_same_weight(folder, plan, name, tensor)


def require_same_weight(folder: Path, plan: WeightPlan, name: str, loaded: Tensor) -> None:
    """Raise CheckpointError unless `loaded`, the whole weight `name`, is that of the files."""
    if name in plan.stored:
        require_same(folder, name, plan.stored[name], loaded)
    for stored, row in joined_rows(plan, name):
        if not holds_row(folder, loaded, stored, row):
            raise not_joined(folder, name, stored)


@torch.no_grad()
def require_same(
    folder: Path, name: str, stored: StoredTensor, loaded: Tensor, *, first: int = 0
) -> None:
    """Raise CheckpointError unless `loaded` holds elements of `stored`, flattened, from number
    `first` on; what it has beyond their end is padding. `name` is the model's."""
    count = min(loaded.numel(), torch.Size(stored.shape).numel() - first)
    starts = list(_starts(count))
    if not starts:
        return
    flat = loaded.detach().reshape(-1)
    size = min(_BLOCK, count)
    ours = torch.cat([flat[start : start + size] for start in starts]).cpu()
    theirs = torch.cat([read_block(folder, stored, first + start, size) for start in starts])
    if theirs.is_floating_point() and isinstance(loaded, nn.Parameter):
        _require_finite(folder, stored, theirs)
    if not torch.equal(ours, theirs.to(ours.dtype)):
        raise CheckpointError(
            f"{folder}: {name} in memory is not {stored.name} of {stored.file}; nothing was done "
            "with it. Was the folder written to while it was read? If not, please report this"
        )


def _starts(count: int) -> Iterable[int]:
    """Return where blocks begin in `count` elements: first, last and between."""
    last = max(count - _BLOCK, 0)
    return sorted({last * block // (_BLOCKS - 1) for block in range(_BLOCKS)}) if count > 0 else ()


def _require_finite(folder: Path, stored: StoredTensor, values: Any) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{folder}: {stored.name} in {stored.file} holds numbers that are not finite (nan or "
            "inf); the model is broken, name another one"
        )
