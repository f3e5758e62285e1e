"""Bytes of the tensors that are alive, counted as operators make them; real or fake tensors."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Hold a context in which models are made and run without memory, mixtures of experts too."""
    with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
        yield


class _GroupedProducts(TorchDispatchMode):
    """Lets fake tensors of any type through the product of experts: torch's own rule for its shape
    takes bfloat16 alone, where its kernels take float32 and float16, too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, the product of experts in bfloat16."""
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return func(*args, **(kwargs or {}))
        first, second, *rest = args
        product = func(first.bfloat16(), second.bfloat16(), *rest, **(kwargs or {}))
        return product.to(first.dtype)


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of storages that are allocated inside it, now (`current`) and
    at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Any) -> None:
        """Do not count the storages of `tensors` when operators return views of them."""
        for tensor in tensors:
            self._note(tensor, counts=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf, counts=True)
        return result

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return
        size = storage.nbytes() if counts else 0

        def forget(_: Any) -> None:
            self._known.pop(key, None)
            self.current -= size

        self._known[key] = weakref.ref(storage, forget)
        self.current += size
        self.peak = max(self.peak, self.current)
