"""Hidden states in front of the first routed layer: computed once for each row, then read.

Which rows a rank computes is a pure function of the run's order of rows, so that all ranks know it
without asking, and take part in each other's collectives.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaskip.arch.prefix import FrozenPrefix
from megaskip.data import Batch
from megaskip.data.row_states import RowStates
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.routing.copies import copy_to


class CachedPrefix:
    """Gives an engine the states that enter its first routed layer, in the dtype of its model."""

    def __init__(self, states: RowStates, dtype: torch.dtype) -> None:
        self._states = states
        self._dtype = dtype
        self._last: tuple[tuple[int, ...], torch.Size, Tensor] | None = None
        """(row numbers, shape of the token ids, states) of the batch that was asked for last."""

    def entering(self, batch: Batch) -> Tensor:
        """Return the states [B, T, D] of a batch's rows on its device, zero where padding is.

        Nothing that is used depends on the padding: no real token sees what comes after it. A batch
        that is asked for twice in a row, by the teacher of --distill and by the model that learns,
        is read once.
        """
        assert batch.row_numbers is not None, "a cached prefix knows numbered rows only"
        of_batch = (batch.row_numbers, batch.input_ids.shape)
        if self._last is None or self._last[:2] != of_batch:
            self._last = (*of_batch, self._read(batch, batch.row_numbers))
        return self._last[2]

    def _read(self, batch: Batch, numbers: Sequence[int]) -> Tensor:
        shape = (*batch.input_ids.shape, self._states.hidden_size)
        states = torch.zeros(shape, dtype=self._states.dtype)
        for row, number in enumerate(numbers):
            read = self._states.read(number)
            states[row, : len(read)] = read
        return copy_to(states, batch.input_ids.device).to(self._dtype)


def first_reads(
    micro_batches: Iterable[tuple[int, Sequence[int]]], present: NDArray[np.bool_], rank: int
) -> list[Sequence[int]]:
    """Return those of this rank's micro-batches that are the first to read one of their rows.

    `micro_batches` are (rank, rows) in the order in which ranks that share their states read them;
    `present` bool [rows] says which rows are there, and afterwards holds those that will be.
    """
    mine = []
    missing = int((~present).sum())
    for reader, rows in micro_batches:
        absent = [row for row in rows if not present[row]]
        if absent:
            present[absent] = True
            missing -= len(absent)
            if reader == rank:
                mine.append(rows)
        if not missing:
            break
    return mine


def compute_states(
    prefix: FrozenPrefix,
    states: RowStates,
    rows: Iterable[Sequence[int] | None],
    make_batch: Callable[[Sequence[int]], Batch],
    placeholder: Batch,
    *,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Compute the states of all `rows`, by micro-batch, that are not there. Collective: every rank
    passes as many micro-batches, None where it has none left, for which `placeholder` runs.

    `check` is called before each of them: it may communicate, and raise on all ranks. A row's
    states are those of the first micro-batch that it is in.
    """
    device = placeholder.input_ids.device
    present = states.present().copy()
    try:
        with prefix.alone():
            for numbers in rows:
                check()
                batch = placeholder if numbers is None else make_batch(numbers).to(device)
                told = (batch.attention_mask, batch.position_ids, batch.lengths)
                computed = prefix.states(batch.input_ids, *told)
                _keep(states, batch, computed, present)
    finally:
        states.flush()


def _keep(states: RowStates, batch: Batch, computed: Tensor, present: NDArray[np.bool_]) -> None:
    """Write those of the states [B, T, D] of a batch that are not `present`."""
    assert batch.row_numbers is not None
    lengths = batch.token_mask.sum(dim=1).tolist()
    for row, number in enumerate(batch.row_numbers):
        if not present[number]:
            states.write(number, computed[row, : lengths[row]])
            present[number] = True


def sharing_ranks(states: RowStates) -> list[int]:
    """Return the ranks that read what this one writes, itself among them. Collective."""
    identities = gather_from_ranks(states.identity)
    return [rank for rank, identity in enumerate(identities) if identity == states.identity]
