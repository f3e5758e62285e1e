"""Watches what a piece of code asks of torch: masks of attention."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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
