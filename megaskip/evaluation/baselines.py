"""What one could skip without learning: the least useful attention, any, or every n-th.

A baseline skips whole sublayers of whole documents, exactly as many as it is asked to, on average
over documents. Shapes: B documents, T tokens, D hidden.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.anatomy import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.data import Batch

_GOLDEN = 0.6180339887498949

Order = Callable[[int, int], Sequence[int]]
"""(document, how many it skips) -> layers, the first of which it skips."""
Policy = Callable[[Sequence[int]], Mapping[int, Tensor]]
"""Documents -> what each routed layer keeps of them, float32 [B, 1], for RouterSet.force."""


@torch.no_grad()
def update_similarity(model: nn.Module, batches: Iterable[Batch]) -> dict[int, float]:
    """Return for each layer the mean cos(X, X + Attn(LN(X))) over the real tokens of `batches`.

    High: the attention changes little, and is dropped first. Source: LLM-Drop, arXiv 2406.15786.
    """
    anatomy = find_decoder(model)
    sums = dict.fromkeys(range(len(anatomy.layers)), 0.0)
    tokens, mask = 0, torch.zeros(0)

    def watch(index: int, layer: nn.Module) -> list[Any]:
        inputs: list[Tensor] = []

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs[:] = [args[0] if args else kwargs["hidden_states"]]

        def compare(_: nn.Module, __: Any, output: Any) -> None:
            update = output[0] if isinstance(output, tuple) else output
            before = inputs[0].float()
            cosine = nn.functional.cosine_similarity(before, before + update.float(), dim=-1)
            sums[index] += float(cosine[mask].double().sum())

        site = layer.get_submodule(find_sites(layer, anatomy.model_type).attention_update)
        return [
            layer.register_forward_pre_hook(note, with_kwargs=True),
            site.register_forward_hook(compare),
        ]

    handles = [h for i, layer in enumerate(anatomy.layers) for h in watch(i, layer)]
    try:
        for batch in batches:
            mask = batch.token_mask
            tokens += int(mask.sum())
            anatomy.decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return {index: total / max(tokens, 1) for index, total in sums.items()}


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
