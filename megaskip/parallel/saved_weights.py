"""What autograd saves of the weights that ZeRO-3 gathers: where they are, not what they hold.

ZeRO-3 takes a layer's weights away behind its forward pass and brings them back for its backward
pass. An operator that saves a view of a weight, as the product of experts does of its stacked
weights, would hold the memory of the whole until then.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _View(NamedTuple):
    """A view of a weight, without its memory."""

    weight: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """In elements, from the first of the weight."""


def save_no_weights(layers: Iterable[nn.Module]) -> None:
    """Let autograd save no memory of the gathered weights of `layers`, each of which ZeRO-3 gathers
    as a whole. Layers that are checkpointed save nothing for longer than their own backward pass,
    and are left alone: their checkpoints count what is saved."""
    for layer in layers:
        hooks = _Hooks(layer)
        layer.register_forward_pre_hook(hooks.enter)
        layer.register_forward_hook(hooks.leave, always_call=True)


class _Hooks:
    """The saved-tensor hooks of one layer while it goes forward."""

    def __init__(self, layer: nn.Module) -> None:
        self._weights = [p for p in layer.parameters() if hasattr(p, "ds_tensor")]
        self._gathered: dict[int, list[nn.Parameter]] = {}
        self._context: torch.autograd.graph.saved_tensors_hooks | None = None

    def enter(self, layer: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled() or getattr(layer, "gradient_checkpointing", False):
            return
        for weight in self._weights:
            self._gathered.setdefault(_storage(weight), []).append(weight)
        self._context = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._context.__enter__()

    def leave(self, *_: Any) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None
        self._gathered.clear()

    def _pack(self, saved: Tensor) -> Tensor | _View:
        # Gathered weights may lie one after the other in a storage.
        for weight in self._gathered.get(_storage(saved), ()):
            offset = saved.storage_offset() - weight.storage_offset()
            if 0 <= offset < weight.numel():
                return _View(weight, saved.size(), saved.stride(), int(offset))
        return saved


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    now = saved.weight.data
    return now.as_strided(saved.size, saved.stride, now.storage_offset() + saved.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
