"""Cache layers that hold keys and values of what was kept, and of nothing else.

They are subclasses of transformers' own layers, whose places they take in a cache: to masks,
positions and `generate` they look as long as the text. Shapes: B rows, n kept rows, H key-value
heads, L slots, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from megaskip.routing.copies import copy_to
from megaskip.routing.decision import SelectedRows

DYNAMIC = (DynamicLayer, DynamicSlidingWindowLayer)
STATIC = (StaticLayer, StaticSlidingWindowLayer)


class KeptLayer:
    """Mixin: a layer whose apparent length is that of the text, not of what it stores."""

    _skip_seen: int
    keys: Any
    values: Any
    is_initialized: bool
    _skip_forget: Callable[[], None]
    _skip_batch: Callable[[], int]
    _skip_pick: Callable[[Tensor], None]
    _skip_crop: Callable[[int], None]

    def get_seq_length(self) -> int:
        """Return the length of the text so far."""
        return self._skip_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (key length, offset) of the mask, as for a layer that holds everything."""
        if hasattr(self, "cumulative_length"):
            return super().get_mask_sizes(query_length)  # type: ignore[misc]
        return self._skip_seen + query_length, 0

    def reset(self) -> None:
        """Forget everything, the decisions too."""
        super().reset()  # type: ignore[misc]
        self._skip_seen = 0
        self._skip_forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens (a positive number is a length to keep)."""
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self._skip_seen, 0)
        self._skip_crop(-tokens_to_remove)
        self._skip_seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Re-order the rows; `beam_idx` int64 [B]."""
        self._skip_pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._skip_pick(torch.arange(self._skip_batch(), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, numbers or a mask."""
        self._skip_pick(torch.arange(self._skip_batch(), device="cpu")[indices.cpu()])


class KeptRows(KeptLayer):
    """Holds the rows of a batch that run this layer: keys and values [n, H, L, D]."""

    _skip_rows: SelectedRows | None = None
    """The kept rows, of B: decisions of a sequence do not change, so nobody waits for a device.
    None before the first one."""

    def advance(self, tokens: int, *, ran: bool) -> None:
        """Take note of `tokens` more tokens, stored or (no row ran) not."""
        self._skip_seen += tokens
        for name in () if ran else ("cumulative_length", "cumulative_length_int"):
            if hasattr(self, name):  # transformers' update counts those that are stored
                setattr(self, name, getattr(self, name) + tokens)

    def _skip_forget(self) -> None:
        self._skip_rows = None
        # A static layer has room for these rows alone; the next ones may be others.
        self.keys = self.values = None
        self.is_initialized = False

    def _skip_batch(self) -> int:
        return 0 if self._skip_rows is None else len(self._skip_rows.mask)

    def _skip_pick(self, index: Tensor) -> None:
        if self._skip_rows is None:
            return
        index = index.cpu()
        rows = self._skip_rows.of_rows(index)
        if self.is_initialized:
            stored_index = torch.cumsum(self._skip_rows.mask.long(), 0) - 1
            stored = copy_to(stored_index[index][rows.mask], self.keys.device)
            self.keys = self.keys.index_select(0, stored)
            self.values = self.values.index_select(0, stored)
        self._skip_rows = rows

    def _skip_crop(self, tokens: int) -> None:
        if self.is_initialized:
            # With no token to remove, sliding layers must still hear of it, while full layers of
            # older transformers would take 0 for the length to keep.
            if tokens or getattr(self, "record_past", False):
                super(KeptLayer, self).crop(-tokens)  # type: ignore[misc]
        elif hasattr(self, "cumulative_length"):
            self.cumulative_length -= tokens


class KeptTokens(KeptLayer):
    """Holds the tokens that run this layer, packed to the left: keys and values [B, H, L, D]."""

    _skip_position: Tensor
    """int64 [B, L], where in the text a slot's token stands; -1 for a free slot."""
    _skip_count: Tensor
    """int64 [B], on the CPU: the slots that each row uses."""
    _skip_incoming: tuple[Tensor, Tensor, Tensor] | None
    """Row, column among the incoming and slot of each token that the next update brings; None when
    all of them go behind what is there."""

    def advance(self, tokens: int) -> None:
        """Take note of `tokens` more tokens, and forget those that left a sliding window."""
        window = getattr(self, "sliding_window", None)
        if window is not None:
            self._skip_forget_before(self._skip_seen - window + 1, at_least=max(window // 4, 1))
            self.cumulative_length = self._skip_seen + tokens
        self._skip_seen += tokens

    def expect(self, position: Tensor, count: Tensor) -> Tensor:
        """Make room for tokens at `position` int64 [B, q], each row's `count` [B] first, then -1;
        `count` is on the CPU.

        Returns the positions of all slots after the coming update, int64 [B, L].
        """
        used, self._skip_count = self._skip_count, self._skip_count + count
        length = self._skip_position.shape[1] + position.shape[1]
        if bool((self._skip_count == length).all()):
            self._skip_incoming = None
            self._skip_position = torch.cat([self._skip_position, position], dim=1)
        else:
            slot = torch.arange(position.shape[1], device="cpu")
            rows, columns = (slot < count.unsqueeze(1)).nonzero(as_tuple=True)
            incoming = torch.stack([rows, columns, used[rows] + columns])
            rows, columns, slots = copy_to(incoming, position.device)
            self._skip_incoming = rows, columns, slots
            self._skip_position = _widen(self._skip_position, int(self._skip_count.max()), 1, -1)
            self._skip_position[rows, slots] = position[rows, columns]
        return self._skip_position

    @property
    def appends(self) -> bool:
        """Return whether the coming update fills every slot of every row."""
        return self._skip_incoming is None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store what is expected of [B, H, q, D] and return keys and values [B, H, L, D]."""
        if not self.is_initialized:
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
        self.keys = self._skip_store(self.keys, key_states)
        self.values = self._skip_store(self.values, value_states)
        return self.keys, self.values

    def _skip_store(self, stored: Tensor, states: Tensor) -> Tensor:
        if self._skip_incoming is None:
            return torch.cat([stored, states], dim=2)
        rows, columns, slots = self._skip_incoming
        stored = _widen(stored, self._skip_position.shape[1], 2, 0)
        stored[rows, :, slots] = states[rows, :, columns]
        return stored

    def _skip_forget(self) -> None:
        self._skip_position = self._skip_position[:, :0]
        self._skip_count = torch.zeros_like(self._skip_count)

    def _skip_batch(self) -> int:
        return self._skip_position.shape[0]

    def _skip_pick(self, index: Tensor) -> None:
        self._skip_position = self._skip_position[index.to(self._skip_position.device)]
        if self.is_initialized:
            index = index.to(self.keys.device)
            self.keys = self.keys.index_select(0, index)
            self.values = self.values.index_select(0, index)
        self._skip_trim()

    def _skip_crop(self, tokens: int) -> None:
        position = self._skip_position
        self._skip_position = position.masked_fill(position >= self._skip_seen - tokens, -1)
        if hasattr(self, "cumulative_length"):
            self.cumulative_length -= tokens
        self._skip_trim()

    def _skip_forget_before(self, start: int, *, at_least: int) -> None:
        """Free the slots of positions below `start`, once some row has `at_least` of them."""
        position = self._skip_position
        stale = (position >= 0) & (position < start)
        if not self.is_initialized or int(stale.sum(1).max()) < at_least:
            return
        position = position.masked_fill(stale, -1)
        order = torch.argsort((position < 0).to(torch.uint8), dim=1, stable=True)
        self._skip_position = position.gather(1, order)
        for name in ("keys", "values"):
            stored = getattr(self, name)
            index = order[:, None, :, None].expand_as(stored)
            setattr(self, name, stored.gather(2, index))
        self._skip_trim()

    def _skip_trim(self) -> None:
        """Give up the slots that no row uses; every row fills its own from the left."""
        self._skip_count = (self._skip_position >= 0).sum(1).cpu()
        length = int(self._skip_count.max()) if len(self._skip_count) else 0
        self._skip_position = self._skip_position[:, :length]
        if self.is_initialized:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def store_rows_in(cache: Any, layer: int) -> KeptRows:
    """Put a layer that holds rows into `cache`, in the place of a fresh one."""
    cache_layer: KeptRows = replace_layer(cache, layer, KeptRows, _skip_seen=0)
    return cache_layer


def store_tokens_in(cache: Any, layer: int, batch: int, device: torch.device) -> KeptTokens:
    """Put a layer that holds tokens into `cache`, in the place of a fresh one."""
    cache_layer: KeptTokens = replace_layer(cache, layer, KeptTokens, _skip_seen=0)
    cache_layer._skip_position = torch.empty(batch, 0, dtype=torch.int64, device=device)
    cache_layer._skip_count = torch.zeros(batch, dtype=torch.int64, device="cpu")
    return cache_layer


def can_store_some(cache: Any, layer: Any) -> bool:
    """Return whether a layer of a cache is fresh and of a kind that can hold a part of the text."""
    return type(layer) in DYNAMIC and not layer.get_seq_length() and not is_offloaded(cache)


def can_store_rows(cache: Any, layer: Any) -> bool:
    """Return whether a layer of a cache is fresh and can hold some rows; static ones can, too."""
    fresh_static = type(layer) in STATIC and not layer.is_initialized and not is_offloaded(cache)
    return fresh_static or can_store_some(cache, layer)


def is_offloaded(cache: Any) -> bool:
    """Return whether a cache fetches a layer's keys when the layer below is updated: then every
    layer must be."""
    return bool(getattr(cache, "offloading", False))


def replace_layer(cache: Any, layer: int, mixin: Any, **extra: Any) -> Any:
    """Put a layer with a mixin into `cache`, in the place of one that holds the same."""
    old = cache.layers[layer]
    cache_layer: Any = object.__new__(_mixed_class(type(old), mixin))  # type: ignore[arg-type]
    cache_layer.__dict__.update(vars(old), **extra)
    cache.layers[layer] = cache_layer
    return cache_layer


@functools.cache
def _mixed_class(base: Any, mixin: Any) -> Any:
    name = f"{mixin.__name__}{base.__name__}"
    return type(name, (mixin, base), {"__module__": base.__module__})


def _widen(tensor: Tensor, length: int, dim: int, fill: int) -> Tensor:
    """Return a copy with `dim` made longer, to `length` slots."""
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=dim)
