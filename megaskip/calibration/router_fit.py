"""Routers in closed form: each one predicts what skipping a unit costs, in nats.

So scores of different layers are comparable, and one threshold for all skips what is cheapest. No
router is trained (docs/lab.md says how this compares with straight-through training).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaskip.calibration.cost_regression import CostRegression, LinearCost
from megaskip.calibration.unit_costs import deal_groups, measure_costs, read_by_routers
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.parallel.engine import Engine
from megaskip.routing import AffineRouter


def fit_routers(
    engine: Engine,
    batches: Sequence[Batch | None],
    *,
    groups: int,
    distill: float = 1.0,
    seed: int = 0,
    check: Callable[[], object] = lambda: None,
) -> dict[int, LinearCost]:
    """Fill the routers of all routed layers from `batches` of all ranks, as many on each; return
    by layer what was fitted.

    The `batches` of a rank are every n-th of those of all n replicas, so that any number of ranks
    fits the same. Each takes a forward and a backward pass for each of `groups` of layers, which
    skip together: about one over the share that is to be skipped. `distill` is the share of each
    label that is the dense model's prediction: its costs scatter less than those of the text.
    `check` is called before each batch.
    Collective. Raises ConfigError for other routers than affine ones, and without text.
    """
    routers = engine.routers
    if routers.config.router != "affine":
        raise ConfigError(
            f"--router {routers.config.router} cannot predict costs; take affine, whose bias says "
            "what a layer is worth"
        )
    everywhere = len(batches) * engine.num_replicas
    if everywhere < 2:
        raise ConfigError(
            f"{everywhere} batch of text is too little to fit routers on: half of it judges what "
            "is fitted to the other half; give more --data or --cost_rows"
        )
    fits = {
        layer: CostRegression(routers.hidden_size, seed=layer, device=engine.device)
        for layer in routers.layers
    }
    _choose_features(engine, batches, fits)
    for turn, batch in enumerate(batches):
        check()
        number = engine.number_over_replicas(turn)

        def observe(layer: int, read: Tensor, costs: Tensor, half: int = number % 2) -> None:
            fits[layer].observe(read, costs, half=half)

        dealt = deal_groups(routers.layers, groups, seed + number)
        measure_costs(engine, batch, dealt, observe, distill=distill, seed=seed + number)
    fitted = {layer: fit.solve(sum_over_ranks) for layer, fit in fits.items()}
    _fill(engine, fitted)
    return fitted


def split_off(
    batches: Sequence[Batch | None], share: float
) -> tuple[list[Batch | None], list[Batch | None]]:
    """Return (about `share` of `batches`, the others), both from all over them: what routers are
    fitted to, they predict too well for thresholds to be found on it."""
    first: list[Batch | None] = []
    others: list[Batch | None] = []
    for number, batch in enumerate(batches):
        taken = int((number + 1) * share) > int(number * share)
        (first if taken else others).append(batch)
    return first, others


@torch.no_grad()
def _choose_features(
    engine: Engine, batches: Sequence[Batch | None], fits: dict[int, CostRegression]
) -> None:
    """Choose the features of wide routers, with a forward pass over a quarter of the batches."""
    if not any(fit.needs_features for fit in fits.values()):
        return
    with engine.routers.disabled():
        for batch in batches[: max(len(batches) // 4, 1)]:
            with read_by_routers(engine.routers, engine.routers.layers) as read:
                for _ in engine.forwards([batch]):
                    decisions = engine.own_decisions() if batch is not None else {}
                    for layer, decision in decisions.items():
                        fits[layer].sketch(read[layer][decision.unit_mask])
    for fit in fits.values():
        fit.choose_features(sum_over_ranks)


@torch.no_grad()
def _fill(engine: Engine, fitted: dict[int, LinearCost]) -> None:
    """Write the predicted costs into the routers, in a unit in which their logits are near 1."""
    spread = sum(cost.spread**2 + cost.mean**2 for cost in fitted.values()) / len(fitted)
    unit = max(spread, 1e-30) ** 0.5
    for layer, cost in fitted.items():
        router = engine.routers.router(layer)
        assert isinstance(router, AffineRouter)
        router.weight.copy_((cost.weight / unit).unsqueeze(0))
        router.bias.fill_(cost.bias / unit)
