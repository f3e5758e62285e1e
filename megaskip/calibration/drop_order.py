"""Which layers to drop for every text: by measured loss, with what is dropped before.

Costs of single layers differ a hundredfold and do not add up, so each next layer is chosen beside
those that are gone already. Where the routers have compensations they stand in the dropped layers'
places, and are part of what is measured.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megaskip.calibration.finite import require_finite
from megaskip.calibration.fit_progress import FitProgress
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """One step of the order."""

    layer: int
    loss: float
    """Nats a supervised token with this layer and all before it dropped."""


@torch.no_grad()
def greedy_drop_order(
    engine: Engine,
    batches: Sequence[Batch | None],
    count: int,
    *,
    progress: Callable[[], object] = lambda: None,
    kept: FitProgress | None = None,
) -> tuple[float, list[Dropped]]:
    """Return (loss with everything running, the order in which to drop `count` routed layers).

    Lazy greedy: a layer's cost beside those that are dropped is taken to be no lower than when it
    was last measured, so only layers that could be next are measured again. Each measurement is a
    forward pass over `batches` of all ranks; `progress` is called after each. What `kept` has is
    not measured again, and what is measured is kept there. Collective.
    Raises ConfigError when there are fewer routed layers than `count`, MegaskipError for a loss
    that is not finite.
    """
    routers = engine.routers
    if not 0 < count <= len(routers.layers):
        raise ConfigError(
            f"{count} layers cannot be dropped of {len(routers.layers)} routed ones; route more "
            "(--layers), or drop fewer"
        )

    def loss_without(layers: Sequence[int]) -> float:
        known = None if kept is None else kept.losses.get(tuple(layers))
        if known is None:
            with routers.disabled(), routers.override(dict.fromkeys(layers, 0.0)):
                known = engine.evaluate(batches, routed=True).loss
            require_finite(known, _loss_without(layers))
            if kept is not None:
                kept.keep_loss(tuple(layers), known)
        progress()
        return known

    dense = before = loss_without(())
    dropped: list[Dropped] = []
    # (cost, layer, how many layers were dropped when it was measured)
    queue = [(loss_without((layer,)) - dense, layer, 0) for layer in routers.layers]
    heapq.heapify(queue)
    while len(dropped) < count:
        cost, layer, measured_beside = heapq.heappop(queue)
        if measured_beside == len(dropped):
            before += cost
            dropped.append(Dropped(layer=layer, loss=before))
            continue
        gone = [step.layer for step in dropped]
        heapq.heappush(queue, (loss_without([*gone, layer]) - before, layer, len(dropped)))
    return dense, dropped


def _loss_without(layers: Sequence[int]) -> str:
    """Return what a loss is called that was measured with `layers` dropped."""
    dropped = f" with layers {', '.join(map(str, layers))} dropped" if layers else ""
    return f"the loss of the text{dropped}"
