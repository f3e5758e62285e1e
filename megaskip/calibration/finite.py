"""Refusal of numbers that are not finite: what is chosen or fitted by them would mean nothing.
Knows no model."""

from collections.abc import Callable

import torch
from torch import Tensor

from megaskip.errors import MegaskipError
from megaskip.parallel.collectives import sum_over_ranks


def not_finite(what: str) -> MegaskipError:
    """Return the error for numbers that are nan or infinite."""
    return MegaskipError(
        f"{what}: found nan or inf, expected finite numbers. The model overflows in its type or "
        "its weights are damaged: load it in float32, or name another model"
    )


def require_finite(numbers: Tensor | float, what: str) -> None:
    """Raise MegaskipError unless all `numbers`, which are the same on every rank, are finite."""
    if not bool(torch.as_tensor(numbers).isfinite().all()):
        raise not_finite(what)


def sum_of_finite(what: str) -> Callable[[Tensor], None]:
    """Return what replaces a tensor by its sum over the ranks, as `sum_over_ranks` does, and raises
    MegaskipError on all of them unless that is finite. Collective."""

    def add_up(total: Tensor) -> None:
        sum_over_ranks(total)
        require_finite(total, what)

    return add_up
