"""Compensations in closed form: each routed sublayer's update is regressed on what it reads.

One forward pass over calibration text with everything running, for all layers at once. It is a
start for training, or a result of its own where nothing can be trained.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.calibration.low_rank_fit import LowRankFit
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet

_SKETCHED = 4
"""One in so many batches chooses the features, the others are regressed on them."""


@torch.no_grad()
def fit_compensation(
    engine: Engine,
    batches: Sequence[Batch | None],
    *,
    ridge: float = 1e-3,
    check: Callable[[], object] = lambda: None,
) -> dict[int, float]:
    """Fill the compensations of all routed layers from `batches` of all ranks, as many on each.

    Returns by layer which share of the update's variance its map explains on these rows. Every map
    is fitted as if all other layers ran. Reduced-rank ridge regression for "low_rank", the mean
    update for "bias". `check` as in Engine.forwards. Collective.
    Raises ConfigError when the routers have no compensation or there is no text.
    """
    routers = engine.routers
    if routers.config.compensation == "none":
        raise ConfigError("there is nothing to fit with compensation none; take low_rank or bias")
    if not batches:
        raise ConfigError("there is no text to fit compensations on; give more --data")
    fits = _Fits(routers, ridge, engine.device)
    first = max(len(batches) // _SKETCHED, 1)
    with routers.disabled():
        fits.observe(engine, batches[:first], check)
        fits.begin_second_phase()
        fits.observe(engine, batches[first:] or batches, check)
    return fits.finish()


class _Fits:
    """The regressions of all routed layers; those of other pipeline stages see nothing here, and
    get their sums from there."""

    def __init__(self, routers: RouterSet, ridge: float, device: torch.device) -> None:
        config = routers.config
        rank = config.compensation_rank if config.compensation == "low_rank" else 0
        self._routers = routers
        self._by_layer = {
            layer: LowRankFit(routers.hidden_size, rank, ridge=ridge, seed=layer, device=device)
            for layer in routers.layers
        }

    def observe(
        self, engine: Engine, batches: Sequence[Batch | None], check: Callable[[], object]
    ) -> None:
        """Take in the real tokens of batches, from the gates of the layers that are here."""
        try:
            for batch in batches:
                # A batch that counts for nothing still runs, for the other ranks' collectives.
                self._listen(batch is not None)
                for _ in engine.forwards([batch], check):
                    pass
        finally:
            self._listen(False)

    def begin_second_phase(self) -> None:
        for fit in self._by_layer.values():
            fit.begin_second_phase(_sum_over_ranks)

    def finish(self) -> dict[int, float]:
        explained = {}
        for layer, fit in self._by_layer.items():
            fitted = fit.solve(_sum_over_ranks)
            compensation = self._routers.router(layer).compensation
            assert compensation is not None
            for name, parameter in compensation.named_parameters():
                parameter.copy_(getattr(fitted, name))
            explained[layer] = fitted.explained
        return explained

    def _listen(self, on: bool) -> None:
        for layer, gate in self._routers.gates.items():
            gate.observe = self._observer(layer) if on else None

    def _observer(self, layer: int) -> Callable[[Tensor, Tensor], None]:
        def observe(read: Tensor, update: Tensor) -> None:
            pooling = self._routers.state.pooling
            assert pooling is not None, "engines describe every batch"
            self._by_layer[layer].observe(read[pooling.token_mask], update[pooling.token_mask])

        return observe


def _sum_over_ranks(total: Tensor) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
