"""What the device can do at the most: matrix products and copies, measured. MFU and shares of
bandwidth are relative to these, not to a table of cards."""

from collections.abc import Callable

import torch

from megaskip.bench.timing import Stopwatch

_GPU_SIDES = (4096, 8192)
_CPU_SIDES = (512, 1024)
_GPU_BYTES = 2 << 30
_CPU_BYTES = 128 << 20
_REPEATS = 10


def matmul_flops(watch: Stopwatch, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of some square matrix products."""
    sides = _GPU_SIDES if watch.device.type == "cuda" else _CPU_SIDES
    return max(2 * side**3 / _product_seconds(side, watch, dtype) for side in sides)


def copy_bandwidth(watch: Stopwatch) -> float:
    """Return bytes a second, read and written, of the fastest of some large copies."""
    size = _GPU_BYTES if watch.device.type == "cuda" else _CPU_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), watch)


def _product_seconds(side: int, watch: Stopwatch, dtype: torch.dtype) -> float:
    left = torch.randn(side, side, device=watch.device).to(dtype)
    right = torch.randn(side, side, device=watch.device).to(dtype)
    return _fastest(lambda: left @ right, watch)


def _fastest(call: Callable[[], object], watch: Stopwatch) -> float:
    """Return the seconds of the fastest of some runs after two that warm up."""
    return min([watch.seconds(call) for _ in range(_REPEATS + 2)][2:])
