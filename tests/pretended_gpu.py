"""A GPU that is pretended: tensors say that they lie on it and compute on this CPU, and what a GPU
would refuse or leave undone is refused or left undone.

Tensors of two devices in one operation raise an error, as on a GPU. A copy to pinned memory that
nobody waits for is made when somebody waits. Nothing is said about kernels, streams or graphs.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten
_TAKES_INDICES_OF_THE_HOST = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_COPIES = (aten.copy_.default, aten._to_copy.default)
_CPU = torch.device("cpu")
_CUDA, _META = 1, 14
"""Numbers of kinds of devices (c10/core/DeviceType.h)."""


class GpuTensor(torch.Tensor):
    """A tensor of the pretended GPU; its values are in `values`, on the CPU."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> "GpuTensor":
        """Let `values` be those of a tensor on `device`."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        made.values = values  # type: ignore[attr-defined]
        return made  # type: ignore[return-value]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.values!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of a PretendedGpu")


class PretendedGpu(TorchDispatchMode):
    """Context in which torch has GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        """The operations that waited for the device."""
        self._under_way: list[Callable[[], object]] = []

    def __enter__(self) -> Any:
        # torch.tensor(..., device=...) then makes its copy where this context sees it.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*args)

    def arrive(self) -> None:
        """Make the copies that nobody waited for so far."""
        copies, self._under_way = self._under_way, []
        for copy in copies:
            copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = _device_of(func, args, kwargs)
        kwargs.pop("pin_memory", None)
        if func is aten._pin_memory.default:
            return args[0].clone()
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        asked = kwargs.get("device")
        to_host = asked is not None and torch.device(asked).type == "cpu"
        if device.type == "cuda" and (to_host or func is aten._local_scalar_dense.default):
            self._wait(func)
        if device.type == "cuda" and func in (aten.nonzero.default, aten.masked_select.default):
            self._wait(func)
        if asked is not None:
            device, kwargs["device"] = _with_index(torch.device(asked)), _CPU
        result = func(*_values(args), **_values(kwargs))
        return _put_back(result, args, device) if device.type == "cuda" else result

    def _wait(self, func: Any) -> None:
        self.waits.append(str(func))
        self.arrive()

    def _copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        copy = functools.partial(_values(to).copy_, _values(source).clone())
        if source.is_cuda and not to.is_cuda and non_blocking:
            to.fill_(_garbage(to))
            self._under_way.append(copy)
        else:
            if source.is_cuda and not to.is_cuda:
                self._wait("copy_")
            copy()
        return to


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Hold a context in which this machine has a GPU; yields what counts its waits."""
    gpu = PretendedGpu()

    class Event:
        """An event that passes when it is waited for."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def record(self, *args: Any) -> None: ...
        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            gpu._wait("synchronize")

    names = {
        "Event": Event,
        "current_stream": lambda *args: None,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *args: gpu._wait("synchronize"),
    }
    with _guard_of_cuda(), contextlib.ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(gpu)
        # Modules that move get new parameters: the old ones cannot change their class.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        yield gpu


@contextlib.contextmanager
def _guard_of_cuda() -> Iterator[None]:
    """Let torch without CUDA change to such a device, which does nothing, as for meta tensors."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[_CUDA] = guards[_CUDA], guards[_META]
    try:
        yield
    finally:
        guards[_CUDA] = before


def _device_of(func: Any, args: Any, kwargs: Any) -> torch.device:
    """Return where an operation runs; raises RuntimeError where its tensors are apart."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if func in _TAKES_INDICES_OF_THE_HOST:
        tensors = [args[0]]
    on_gpu = {x.device for x in tensors if isinstance(x, GpuTensor)}
    apart = len(on_gpu) > 1 or (on_gpu and any(not x.is_cuda and x.dim() for x in tensors))
    if apart and func not in _COPIES:
        devices = sorted({str(x.device) for x in tensors})
        raise RuntimeError(f"{func}: expected all tensors on the same device, found {devices}")
    return next(iter(on_gpu), _CPU)


def _put_back(result: Any, args: Any, device: torch.device) -> Any:
    """Return a result as tensors of the device, those that an operation changed in place as they
    were given."""
    given = {id(x.values): x for x in tree_leaves(args) if isinstance(x, GpuTensor)}

    def back(values: torch.Tensor) -> torch.Tensor:
        tensor = given.get(id(values))
        return GpuTensor(values, device) if tensor is None else tensor

    return tree_map_only(torch.Tensor, back, result)


def _values(tree: Any) -> Any:
    return tree_map(lambda x: x.values if isinstance(x, GpuTensor) else x, tree)


def _with_index(device: torch.device) -> torch.device:
    """Return a device with its number; "cuda" alone is "meta" to the guard that stands for it."""
    is_gpu = device.type in ("cuda", "meta")
    return torch.device("cuda", max(device.index or 0, 0)) if is_gpu else device


def _garbage(tensor: torch.Tensor) -> Any:
    return float("nan") if tensor.is_floating_point() else 77
