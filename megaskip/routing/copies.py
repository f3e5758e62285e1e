"""Copies to a GPU that nobody waits for."""

import torch
from torch import Tensor


def copy_to(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on another device. A copy from the CPU to a GPU is not waited for, which
    takes pinned memory; one to the CPU is, for it must have arrived when it is read."""
    to_gpu = tensor.is_cpu and torch.device(device).type == "cuda"
    return (tensor.pin_memory() if to_gpu else tensor).to(device, non_blocking=tensor.is_cpu)
