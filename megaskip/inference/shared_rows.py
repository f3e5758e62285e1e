"""Rows that the layers of a decode step keep, selected for all layers at once.

Shapes: B rows, n kept rows of a layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megaskip.inference.kept import KeptRows
from megaskip.routing.copies import copy_to
from megaskip.routing.decision import SelectedRows
from megaskip.routing.kept_units import Select


def shared_select(cache: Any, layer: int, rows: SelectedRows) -> Select:
    """Return what gives a layer's `rows` of the tensors that a decode step hands to every layer.

    They are those of the layer in `cache`; some run and some do not.
    """
    by_device: dict[torch.device, SharedRows] = cache.__dict__.setdefault("_skip_shared_rows", {})
    shared = by_device.get(rows.device)
    if shared is None or shared.rows.get(layer) is not rows:  # a first step, or re-ordered rows
        shared = by_device[rows.device] = SharedRows(dict(_mixed_rows(cache, rows.device)))
    return shared.select_of(layer)


class SharedRows:
    """The kept rows of all layers on one device whose rows differ: one index for a generation."""

    def __init__(self, rows: dict[int, SelectedRows]) -> None:
        self.rows = rows
        """By layer, ascending."""
        places = [selected.mask.nonzero().squeeze(1) for selected in rows.values()]
        self._lengths = [len(place) for place in places]
        self._index = copy_to(torch.cat(places), next(iter(rows.values())).device)
        for selected, index in zip(rows.values(), self._index.split(self._lengths), strict=True):
            selected.__dict__.setdefault("index", index)
        self._order = {layer: number for number, layer in enumerate(rows)}
        self._selected: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def select_of(self, layer: int) -> Select:
        """Return what gives the rows of a layer; with the first layer a new step begins."""
        number = self._order[layer]
        if not number:
            self._selected.clear()

        def select(tensor: Tensor) -> Tensor:
            if tensor.device != self._index.device:  # a device_map copies arguments to layers
                return self.rows[layer].select(tensor)
            for source, of_layers in self._selected:
                if source is tensor:
                    return of_layers[number]
            of_layers = tensor.index_select(0, self._index).split(self._lengths)
            self._selected.append((tensor, of_layers))
            return of_layers[number]

        return select


def _mixed_rows(cache: Any, device: torch.device) -> Iterator[tuple[int, SelectedRows]]:
    for number, layer in enumerate(cache.layers):
        rows = layer._skip_rows if isinstance(layer, KeptRows) else None
        if rows is not None and rows.device == device and rows.mixed:
            yield number, rows
