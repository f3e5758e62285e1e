"""Watches what a piece of code asks of torch: masks of attention, and waits for a GPU."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AttentionMasks(TorchFunctionMode):
    """Counts the calls of scaled_dot_product_attention, and those that are given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.masked = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls += 1
            self.masked += kwargs.get("attn_mask") is not None
        return func(*args, **kwargs)


class Waits(TorchFunctionMode):
    """Counts what would wait for a GPU, on a CPU: reading a tensor's values, finding out how many
    there are, and copying unpinned memory.

    Tensors count as the device's, but for those made without `device` or copied from it, and what
    is computed from such tensors alone.
    """

    _READS = frozenset(
        "item tolist cpu numpy nonzero argwhere unique masked_select equal allclose is_nonzero "
        "__bool__ __int__ __float__ __index__ __array__ __contains__".split()
    )
    _MAKES = frozenset(["tensor", "as_tensor", "new_tensor"])

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        """Which call, from which line."""

    def take(self) -> list[str]:
        """Return the calls so far, and count anew."""
        calls, self.calls = self.calls, []
        return calls

    @staticmethod
    def _copies(name: str, args: Any, device: Any) -> bool:
        """Return whether a tensor is made of numbers of the host, but not none, on the device."""
        data = args[name == "new_tensor"]
        made_there = name == "new_tensor" or _is_device(device)
        return made_there and not isinstance(data, torch.Tensor) and data != []

    @staticmethod
    def put_on_host(tensor: torch.Tensor) -> torch.Tensor:
        """Let a tensor count as the host's."""
        tensor._on_host = True  # type: ignore[attr-defined]
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = all(getattr(x, "_on_host", False) for x in tensors)
        device = kwargs.get("device")
        moves = name == "to" and _is_device(args[1] if len(args) > 1 else device)
        if (
            (name in self._READS and not on_host)
            or (name in ("__getitem__", "__setitem__") and _by_mask(args[1]) and not on_host)
            or (name in self._MAKES and self._copies(name, args, device))
            or (moves and on_host and not kwargs.get("non_blocking"))
        ):
            self.calls.append(f"{name}, {_line()}")
        result = func(*args, **kwargs)
        if isinstance(result, (tuple, list)) and on_host and tensors:
            for item in tree_leaves(result):
                if isinstance(item, torch.Tensor):
                    self.put_on_host(item)
        if not isinstance(result, torch.Tensor):
            return result
        if name == "cpu":
            return self.put_on_host(result.view_as(result))
        if moves and on_host:
            return torch.Tensor.view_as(result, result)
        if on_host and (tensors or not _is_device(device)):
            return self.put_on_host(result)
        return result


def _is_device(value: Any) -> bool:
    """Return whether a call names the device. "cpu" in letters is what torch's optimizers say for
    the host."""
    return isinstance(value, torch.device)


def _by_mask(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(item, torch.Tensor) and item.dtype == torch.bool and item.dim() for item in items
    )


def _line() -> str:
    frames = [f for f in traceback.extract_stack() if "/site-packages/torch/" not in f.filename]
    frame = frames[-3]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"


class IndexCalls(TorchDispatchMode):
    """Counts what looks for rows or chooses them: each is a kernel, however few rows."""

    _NAMES = frozenset(
        "index index_select index_copy index_copy_ index_add index_put index_put_ gather scatter "
        "scatter_ nonzero masked_select argsort sort cumsum".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        """Which operation, from which line."""

    def take(self) -> list[str]:
        """Return the calls so far, and count anew."""
        calls, self.calls = self.calls, []
        return calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self._NAMES:
            self.calls.append(f"{name}, {_line()}")
        return func(*args, **(kwargs or {}))


class OperationTape(TorchDispatchMode):
    """Stands for a CUDA graph on a CPU: plays operations back on the tensors of the recording,
    with nothing of Python between them. What a step reads from the host stays as it was recorded.

    Unlike a graph it runs the step while it records, so recording undoes what that has written.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.replays = 0
        self._operations: list[tuple[Any, Any, Any, list[Any]]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def rehearse(self, step: Any) -> tuple[Any, int]:
        """Run a step; returns its output, and how often it waited."""
        with Waits() as waits:
            output = step()
        return output, len(waits.take())

    def record(self, step: Any) -> Any:
        """Record a step, and put back what it wrote."""
        with self:
            output = step()
        for tensor, before in self._before.values():
            tensor.copy_(before)
        return output

    def listing(self) -> list[tuple[str, list[Any]]]:
        """Return the operations: their names, and the shapes of what they return."""
        return [(str(func), [x.shape for x in made]) for func, _, _, made in self._operations]

    def replay(self) -> None:
        """Run the operations again; results go where the recorded ones lie."""
        self.replays += 1
        for func, args, kwargs, made in self._operations:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(made, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for tensor in (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
                self._before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self._operations.append((func, args, kwargs, made))
        return result
