"""AdamW over what trains, and the one reduction of its gradients over all ranks."""

from collections.abc import Mapping

import torch
from torch import nn

from megaskip.config import OptimConfig
from megaskip.parallel.collectives import sum_over_ranks


def make_adamw(parameters: Mapping[str, nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW whose state exists from the start, so that it can be measured and restored."""
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=optim.lr, weight_decay=optim.weight_decay, foreach=True
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use the learning rate `lr` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def reduce_gradients(
    parameters: Mapping[str, nn.Parameter], *, world_size: int, max_norm: float
) -> float:
    """Sum the gradients over all ranks, clip them to `max_norm` (0: no clipping) and return their
    norm. A parameter without gradient counts as one of zeros. Collective."""
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    if world_size > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        sum_over_ranks(flat)
        summed = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view_as(gradient))
    return float(nn.utils.clip_grad_norm_(parameters.values(), max_norm or float("inf")))
