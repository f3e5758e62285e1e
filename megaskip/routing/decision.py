"""One routed layer's decision for one batch. Knows tensors, not models.

Shapes: B rows, T tokens, U units of decision in a row (1 for a sequence, segments of a packed row,
or T tokens).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedRows:
    """A selection of a number of rows or tokens: those that run, or those that do not."""

    index: Tensor
    """int64 [n], ascending."""
    total: int

    @property
    def all(self) -> bool:
        """Return whether everything is selected."""
        return len(self.index) == self.total

    @property
    def none(self) -> bool:
        """Return whether nothing is selected."""
        return len(self.index) == 0


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """What one layer's router decided: which units run, and what it based that on.

    Which rows and tokens run is computed once and kept, for reading it waits for the device. Those
    that do not run wait once more only where some run and some do not.
    """

    logit: Tensor
    """float32 [B, U]."""
    keep: Tensor
    """float32 [B, U], 1 = run; its gradient reaches the router (straight-through)."""
    unit_mask: Tensor
    """bool [B, U], False for units that are padding."""
    unit_of_token: Tensor | None
    """int64 [B, T], the unit each token belongs to; None where U is 1 or T."""

    def per_token(self) -> Tensor:
        """Return keep as float32 [B, 1] or [B, T], ready to multiply [B, T, D] after
        unsqueeze(-1)."""
        if self.unit_of_token is None:
            return self.keep
        return self.keep.gather(1, self.unit_of_token)

    @functools.cached_property
    def rows(self) -> SelectedRows:
        """The rows, of B, in which some unit runs."""
        return _selected((self.keep.detach() > 0).any(dim=1))

    @functools.cached_property
    def tokens(self) -> SelectedRows:
        """The tokens, of B * T, that run; not for one decision a row."""
        return _selected((self.per_token().detach() > 0).flatten())

    @functools.cached_property
    def skipped_rows(self) -> SelectedRows:
        """The rows, of B, in which no unit runs."""
        return _others(self.rows) or _selected((self.keep.detach() == 0).all(dim=1))

    @functools.cached_property
    def skipped_tokens(self) -> SelectedRows:
        """The tokens, of B * T, that do not run; not for one decision a row."""
        return _others(self.tokens) or _selected((self.per_token().detach() == 0).flatten())

    @property
    def is_per_row(self) -> bool:
        """Return whether all tokens of a row share one decision."""
        return self.unit_of_token is None and self.keep.shape[1] == 1

    def kept(self) -> Tensor:
        """Return the number of real units that run, as a float32 scalar with gradient."""
        return (self.keep * self.unit_mask).sum()

    def units(self) -> Tensor:
        """Return the number of real units, as a float32 scalar."""
        return self.unit_mask.sum(dtype=torch.float32)


def _selected(mask: Tensor) -> SelectedRows:
    return SelectedRows(index=mask.nonzero().squeeze(1), total=len(mask))


def _others(selected: SelectedRows) -> SelectedRows | None:
    """Return what is not selected where that is everything or nothing, without a wait."""
    device, total = selected.index.device, selected.total
    if selected.none:
        return SelectedRows(index=torch.arange(total, device=device), total=total)
    if selected.all:
        return SelectedRows(index=selected.index.new_empty(0), total=total)
    return None
