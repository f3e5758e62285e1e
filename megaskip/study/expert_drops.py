"""Ways to skip experts without learning, to compare learnt routers with: whole experts for every
text, or tokens at experts by chance.

Shapes: R routed layers, E experts of a layer, B rows, U units of decision in a row.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.calibration.expert_load import ExpertLoad
from megaskip.data import Batch
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet

Expert = tuple[int, int]
"""A routed layer and the number of an expert in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """What a way to skip came to on held-out text."""

    share: float
    """Of the pairs of a token and an expert that it is given to."""
    loss: float
    """Nats a supervised token."""


def drop_experts(routers: RouterSet, dropped: Collection[Expert]) -> None:
    """Let fresh affine routers skip the `dropped` experts for every token, and no other."""
    with torch.no_grad():
        for layer in routers.layers:
            router = routers.router(layer)
            bias = router.get_parameter("bias")
            router.weight.zero_()
            bias.zero_()
            for expert in (number for of_layer, number in dropped if of_layer == layer):
                bias[expert] = -1.0


def order_by_loss(
    engine: Engine, batches: Sequence[Batch | None], *, progress: Callable[[], object]
) -> list[Expert]:
    """Return all experts, those first that are missed least for each pair that goes with them: by
    the loss without each of them alone. Collective; a forward pass for each expert."""
    routers = engine.routers
    assert routers.experts is not None
    dense, costs = engine.evaluate(batches, routed=False).loss, {}
    for layer in routers.layers:
        for number in range(routers.experts.count):
            drop_experts(routers, {(layer, number)})
            alone = engine.evaluate(batches, routed=True)
            skipped = max(1 - alone.capacity, 1e-9)
            costs[layer, number] = (alone.loss - dense) / skipped
            progress()
    drop_experts(routers, ())
    return sorted(costs, key=lambda expert: costs[expert])


def order_by_load(load: ExpertLoad) -> list[Expert]:
    """Return all experts, those first that are given the fewest tokens."""
    tokens = {
        (layer, number): count
        for layer, counts in zip(load.layers, load.assigned.tolist(), strict=True)
        for number, count in enumerate(counts)
    }
    return sorted(tokens, key=lambda expert: tokens[expert])


class StaticDrop:
    """Whole experts dropped for every text, in an order; measured on some held-out text."""

    def __init__(
        self, engine: Engine, batches: Sequence[Batch | None], order: Sequence[Expert]
    ) -> None:
        self._engine, self._batches, self._order = engine, batches, order
        self._measured: dict[int, Skipped] = {}

    def at(self, share: float) -> Skipped:
        """Return what dropping the first experts comes to at exactly `share`: interpolated between
        the numbers of experts on either side, whole experts being what can be dropped.
        Collective."""
        low, high = 0, len(self._order)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._first(middle).share <= share else (low, middle)
        below, above = self._first(low), self._first(high)
        part = (share - below.share) / max(above.share - below.share, 1e-9)
        return Skipped(share=share, loss=below.loss + part * (above.loss - below.loss))

    def _first(self, count: int) -> Skipped:
        """Return what dropping the first `count` experts comes to."""
        if count not in self._measured:
            routers = self._engine.routers
            drop_experts(routers, self._order[:count])
            result = self._engine.evaluate(self._batches, routed=True)
            drop_experts(routers, ())
            self._measured[count] = Skipped(share=1 - result.capacity, loss=result.loss)
        return self._measured[count]


def random_drop(engine: Engine, batches: Sequence[Batch], share: float, seed: int) -> Skipped:
    """Return what skipping a `share` of all pairs by chance comes to. Of one process."""
    generator = torch.Generator().manual_seed(seed)
    kept = units = loss = supervised = 0.0
    for batch in batches:
        shape = (len(batch.input_ids), batch.input_ids.shape[1] * engine.routers.choices)
        drawn: dict[int, Tensor | float] = {
            layer: (torch.rand(shape, generator=generator) >= share).float()
            for layer in engine.routers.layers
        }
        with engine.routers.override(drawn):
            result = engine.evaluate([batch], routed=True)
        of_batch = float(batch.token_mask.sum())
        kept, units = kept + result.capacity * of_batch, units + of_batch
        loss += result.loss * batch.counts.supervised
        supervised += batch.counts.supervised
    return Skipped(share=1 - kept / units, loss=loss / supervised)
