"""Ways to skip attention without learning: the least useful layers, random ones, or every n-th.

A baseline skips whole sublayers of whole documents; on average over documents it skips exactly the
asked number. Shapes: B documents.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megaskip.routing.any_budget import golden_fraction

Order = Callable[[int, int], Sequence[int]]
"""(document, how many layers it skips) -> layers; it skips the first ones of them. Documents are
numbered."""
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
    """Return the order whose first `count` layers are spread evenly over the depth."""

    def order(document: int, count: int) -> Sequence[int]:
        even = [layers[int((i + 0.5) * len(layers) / count)] for i in range(count)]
        return even + [layer for layer in layers if layer not in even]

    return order


def skipping(order: Order, layers: Sequence[int], count: float) -> Policy:
    """Return the policy that skips `count` of `layers` in each document, on average exactly.

    The fraction of `count` is the share of documents that skip one layer more. They are chosen by
    the golden-ratio sequence, the same ones for every order, so that policies can be compared.
    """

    def policy(documents: Sequence[int]) -> Mapping[int, Tensor]:
        keep = {layer: torch.ones(len(documents), 1) for layer in layers}
        for row, document in enumerate(documents):
            whole = math.floor(count)
            take = whole + (golden_fraction(document) < count - whole)
            for layer in order(document, take)[:take]:
                keep[layer][row] = 0.0
        return keep

    return policy
