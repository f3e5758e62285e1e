"""How many steps a run takes, and the learning rate of each."""

import math

from megaskip.config import OptimConfig
from megaskip.data import StreamingRows
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError


def total_steps(optim: OptimConfig, loader: DataLoader) -> int:
    """Return how many optimizer steps a run takes, at least 1; raises ConfigError when that is not
    known."""
    if optim.max_steps is not None:
        return optim.max_steps
    rows = loader.data.train
    if isinstance(rows, StreamingRows):
        raise ConfigError("--streaming needs --max_steps: the length of a stream is not known")
    return max(math.ceil(optim.epochs * len(rows) / loader.global_batch_size), 1)


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """Return the rate of step `step` of `total` (from 0): a linear warm-up, then a cosine."""
    warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
