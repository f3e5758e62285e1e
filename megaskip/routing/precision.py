"""What keeps routers and maps in float32, whatever the model around them is cast to."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which arithmetic on a device has the type of its tensors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_cast(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what `change` does to a tensor, such as moving it to a device, but not a change of its
    type."""

    def changed(tensor: Tensor) -> Tensor:
        result = change(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return changed
