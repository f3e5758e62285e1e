"""Peak bytes of a call: of the allocator on a GPU, of live tensors on a CPU. Memory given back."""

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megaskip.parallel.live_bytes import LiveBytes


def peak_of(call: Callable[[], object], device: torch.device, kept: Iterable[Tensor]) -> int:
    """Return the most bytes that a call needs at once, beyond those of the tensors in `kept` and
    all else that was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    live = LiveBytes()
    live.ignore(kept)
    with live:
        call()
    return live.peak


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
