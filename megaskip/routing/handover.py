"""Decisions that a pipeline stage hands on with the hidden states, and takes over from below.

Knows tensors, not processes. Shapes: n layers, B rows, U units of decision in a row.
"""

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision
from megaskip.routing.routers import Routers


def carried_keep(routers: Routers) -> Tensor | None:
    """Return all decisions so far, float32 [n, B, U] in the order of the layers, with gradient.

    n counts the routed layers up to and with the stage's own; None without any.
    """
    keeps = [decision.keep for decision in routers.decisions().values()]
    return torch.stack(keeps) if keeps else None


def receive_keep(routers: Routers, keep: Tensor) -> None:
    """Take over what the stages below decided, float32 [n, B, U]: the first n routed layers'.

    Call it between `set_batch` and the forward pass. Their penalty and shares are then computed
    here, and the penalty's gradient returns through `keep`; their logits stay where they were made.
    """
    pooling = routers.state.pooling
    assert pooling is not None, "set_batch() comes before receive_keep()"
    for layer, of_layer in zip(routers.layers, keep, strict=False):
        decision = RoutingDecision(
            logit=of_layer.detach(),
            keep=of_layer,
            unit_mask=pooling.unit_mask,
            unit_of_token=pooling.unit_of_token,
            choices=pooling.choices,
        )
        routers.state.record(layer, decision)
