"""AdamW over what trains, and the one reduction of its gradients over all ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megaskip.config import AdapterConfig, OptimConfig
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.routing.adapters import is_adapter
from megaskip.routing.compensation import is_compensation


def make_adamw(
    parameters: Mapping[str, nn.Parameter],
    optim: OptimConfig,
    adapter: AdapterConfig | None = None,
) -> torch.optim.AdamW:
    """Return AdamW whose state exists from the start, so that it can be measured and restored.

    Compensations and adapters learn at rates of their own; `lr_ratio` of a group is its rate over
    --lr.
    """
    maps = [p for name, p in parameters.items() if is_compensation(name)]
    adapters = [p for name, p in parameters.items() if is_adapter(name)]
    apart = {id(p) for p in (*maps, *adapters)}
    others = [p for p in parameters.values() if id(p) not in apart]
    groups = [
        {"params": others, "lr": optim.lr, "lr_ratio": 1.0},
        {"params": maps, "lr": optim.compensation_lr, "lr_ratio": optim.compensation_lr_ratio},
    ]
    if adapter is not None:
        ratio = adapter.lora_lr / optim.lr if optim.lr else 1.0
        groups.append({"params": adapters, "lr": adapter.lora_lr, "lr_ratio": ratio})
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        foreach=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use the learning rate `lr` from now on, and other groups of parameters theirs in
    proportion."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def clear_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Set the gradients of all parameters to zero, those included that another rank updates."""
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.zero_()


def reduce_gradients(
    parameters: Mapping[str, nn.Parameter], *, world_size: int, max_norm: float
) -> Tensor:
    """Sum the gradients over all ranks, clip them to `max_norm` (0: no clipping) and return their
    norm, float32 [] on their device. A parameter without gradient counts as one of zeros.
    Collective."""
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
    return nn.utils.clip_grad_norm_(parameters.values(), max_norm or float("inf"))
