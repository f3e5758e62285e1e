"""One routed layer's decision for one batch. Knows tensors, not models.

Shapes: B rows, T tokens, U units of decision in a row (1 for a sequence, segments of a packed row,
or T tokens, or T * K where each token decides about each of its K experts).
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megaskip.routing.copies import CopyToHost, copy_to


@dataclass(frozen=True, kw_only=True, eq=False)
class SelectedRows:
    """A selection of a number of rows or tokens: those that run, or those that do not. The host
    knows it, so that branches and indices do not wait for a device."""

    mask: Tensor
    """bool [total], on the CPU."""
    device: torch.device
    """Where the rows are."""

    @classmethod
    def of(cls, mask: Tensor, copy: "CopyToHost | LineOfCopy | None" = None) -> "SelectedRows":
        """Return what `mask` bool [total] selects; its device is waited for, once: for all that it
        has to do, or for the `copy` of the mask that is under way."""
        return cls(mask=mask.cpu() if copy is None else copy.read(), device=mask.device)

    @functools.cached_property
    def index(self) -> Tensor:
        """int64 [n], ascending, on the device."""
        return copy_to(self.mask.nonzero().squeeze(1), self.device)

    @functools.cached_property
    def all(self) -> bool:
        """Whether everything is selected."""
        return bool(self.mask.all())

    @functools.cached_property
    def none(self) -> bool:
        """Whether nothing is selected."""
        return not self.mask.any()

    @property
    def mixed(self) -> bool:
        """Whether some of it is selected and some is not."""
        return not (self.all or self.none)

    @functools.cached_property
    def others(self) -> "SelectedRows":
        """The selection of what is not in this one."""
        return SelectedRows(mask=~self.mask, device=self.device)

    def select(self, tensor: Tensor) -> Tensor:
        """Return the selected rows of a tensor [total, ...]."""
        return tensor.index_select(0, self.index)

    def of_rows(self, index: Tensor) -> "SelectedRows":
        """Return the selection once the rows are those of `index`, int64 on the CPU."""
        return SelectedRows(mask=self.mask[index], device=self.device)


@dataclass(frozen=True, kw_only=True)
class RoutingDecision:
    """What one layer's router decided: which units run, and what it based that on.

    Which rows and tokens run is computed once and kept, for reading it waits for the device.
    """

    logit: Tensor
    """float32 [B, U]."""
    keep: Tensor
    """float32 [B, U], 1 = run; its gradient reaches the router (straight-through)."""
    unit_mask: Tensor
    """bool [B, U], False for units that are padding."""
    unit_of_token: Tensor | None
    """int64 [B, T], the unit each token belongs to; None where U is 1, T or T * K."""
    choices: int = 1
    """Units of each token, side by side: K where its experts are decided about."""
    expert: Tensor | None = None
    """int64 [B, U], which expert each unit is about; None where none is, and in stages below."""
    _copy: "ClassVar[CopyToHost | LineOfCopy | None]" = None
    """Of what runs, under way to the host."""

    def per_token(self) -> Tensor:
        """Return keep as float32 [B, 1] or [B, T], ready to multiply [B, T, D] after
        unsqueeze(-1); of experts the share of a token's that run."""
        if self.choices > 1:
            return self.keep.view(len(self.keep), -1, self.choices).mean(-1)
        if self.unit_of_token is None:
            return self.keep
        return self.keep.gather(1, self.unit_of_token)

    @functools.cached_property
    def rows(self) -> SelectedRows:
        """The rows, of B, in which some unit runs."""
        return SelectedRows.of(self._running_rows(), self._copy if self.is_per_row else None)

    @functools.cached_property
    def tokens(self) -> SelectedRows:
        """The tokens, of B * T, that run; not for one decision a row."""
        return SelectedRows.of(self._running_tokens(), None if self.is_per_row else self._copy)

    @functools.cached_property
    def pairs(self) -> SelectedRows:
        """The units, of B * U, that run: where experts are decided about, tokens at experts."""
        return SelectedRows.of((self.keep.detach() > 0).flatten())

    def send_to_host(self) -> None:
        """Begin to copy what runs to the host, for a sublayer that will ask for it later: it then
        does not wait for what the device is told to do in between."""
        if not self.__dict__.keys() & {"rows", "tokens", "_copy"}:
            self.__dict__["_copy"] = CopyToHost(self._running())

    def take_over(self, earlier: "RoutingDecision") -> None:
        """Know what runs from `earlier`, the decision that this one computes again."""
        known = {k: v for k, v in earlier.__dict__.items() if k in ("rows", "tokens", "pairs")}
        self.__dict__.update(known)

    def on(self, device: torch.device) -> "RoutingDecision":
        """Return the decision on the device of its layer: it may have been made elsewhere."""
        if self.keep.device == device:
            return self
        moved = dataclasses.replace(
            self,
            logit=copy_to(self.logit, device),
            keep=copy_to(self.keep, device),
            unit_mask=copy_to(self.unit_mask, device),
            unit_of_token=_copy_if_any(self.unit_of_token, device),
            expert=_copy_if_any(self.expert, device),
        )
        if "_copy" in self.__dict__:
            moved.__dict__["_copy"] = self._copy
        return moved

    def _running(self) -> Tensor:
        return self._running_rows() if self.is_per_row else self._running_tokens()

    def _running_rows(self) -> Tensor:
        return (self.keep.detach() > 0).any(dim=1)

    def _running_tokens(self) -> Tensor:
        return (self.per_token().detach() > 0).flatten()

    @property
    def is_per_row(self) -> bool:
        """Return whether all tokens of a row share one decision."""
        return self.unit_of_token is None and self.keep.shape[1] == 1

    def of_rows(self, index: Tensor) -> "RoutingDecision":
        """Return the decision once the batch's rows are those of `index` int64, on the CPU; for one
        decision a row. What the host knows of it stays known."""
        there = copy_to(index, self.keep.device)
        tensors = {name: getattr(self, name) for name in ("logit", "keep", "unit_mask")}
        picked = {name: tensor.index_select(0, there) for name, tensor in tensors.items()}
        decision = dataclasses.replace(self, **picked)
        if "rows" in self.__dict__:
            decision.__dict__["rows"] = self.rows.of_rows(index)
        return decision

    def kept(self) -> Tensor:
        """Return the number of real units that run, as a float32 scalar with gradient."""
        return (self.keep * self.unit_mask).sum()

    def units(self) -> Tensor:
        """Return the number of real units, as a float32 scalar."""
        return self.unit_mask.sum(dtype=torch.float32)


def _copy_if_any(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else copy_to(tensor, device)


@dataclass(frozen=True, slots=True)
class LineOfCopy:
    """One line of a copy that is under way to the host."""

    copy: CopyToHost
    number: int

    def read(self) -> Tensor:
        """Return the line, on the CPU; waits until the copy is there."""
        return self.copy.read()[self.number]


def send_together(decisions: Sequence[RoutingDecision]) -> None:
    """Begin to copy what runs to the host, in one copy: who reads the first decision waits for all
    of them."""
    copy = CopyToHost(torch.stack([decision._running() for decision in decisions]))
    for number, decision in enumerate(decisions):
        decision.__dict__["_copy"] = LineOfCopy(copy, number)
