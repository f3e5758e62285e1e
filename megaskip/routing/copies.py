"""Copies to and from a GPU that nobody waits for."""

from typing import Any

import torch
from torch import Tensor


def copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on another device. A copy from the CPU to a GPU is not waited for, which
    takes pinned memory; one to the CPU is, for it must have arrived when it is read."""
    to_gpu = tensor.is_cpu and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if to_gpu else tensor).to(device, non_blocking=tensor.is_cpu)


class CopyToHost:
    """A copy of a tensor on the CPU, under way: a GPU makes it when it gets there."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: Any = None
        self._read: Tensor | None = None
        self._copy = tensor.detach()
        if tensor.is_cuda:
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._copy = pinned.copy_(self._copy, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record(torch.cuda.current_stream(tensor.device))

    @property
    def has_arrived(self) -> bool:
        """Whether `read` would not wait."""
        return self._arrival is None or bool(self._arrival.query())

    def read(self) -> Tensor:
        """Return the copy, on the CPU; waits until it is there, once."""
        if self._read is None:
            if self._arrival is not None:
                self._arrival.synchronize()
            self._read, self._arrival = self._copy.cpu(), None
        return self._read
