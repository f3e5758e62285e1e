"""What one could skip without learning: the least useful attention, any, or every n-th.

A baseline skips whole sublayers of whole documents, exactly as many as it is asked to, on average
over documents. Shapes: B documents.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949

Order = Callable[[int, int], Sequence[int]]
"""(document, how many it skips) -> layers, the first of which it skips."""
Policy = Callable[[Sequence[int]], Mapping[int, Tensor]]
"""Documents -> what each routed layer keeps of them, float32 [B, 1], for RouterSet.override."""


def static_order(similarity: Mapping[int, float], layers: Sequence[int]) -> Order:
    """Return the order that drops the most redundant of `layers` first, the same for all."""
    ranked = sorted(layers, key=lambda layer: -similarity[layer])
    return lambda document, count: ranked


def random_order(layers: Sequence[int], seed: int) -> Order:
    """Return an order that is shuffled anew for each document."""

    def order(document: int, count: int) -> Sequence[int]:
        return random.Random(seed * 1_000_003 + document).sample(list(layers), len(layers))

    return order


def uniform_order(layers: Sequence[int]) -> Order:
    """Return the order whose first layers lie evenly over the depth, however many they are."""

    def order(document: int, count: int) -> Sequence[int]:
        spread = [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]
        return spread + [layer for layer in layers if layer not in spread]

    return order


def skipping(order: Order, layers: Sequence[int], count: float) -> Policy:
    """Return the policy that skips `count` of `layers` in each document, on average exactly.

    A fraction is the share of documents that skip one more: those where the golden-ratio sequence
    lies below it, the same for every order, so that policies are compared on equal terms.
    """

    def policy(documents: Sequence[int]) -> Mapping[int, Tensor]:
        keep = {layer: torch.ones(len(documents), 1) for layer in layers}
        for row, document in enumerate(documents):
            whole = math.floor(count)
            take = whole + (document * _GOLDEN % 1.0 < count - whole)
            for layer in order(document, take)[:take]:
                keep[layer][row] = 0.0
        return keep

    return policy
