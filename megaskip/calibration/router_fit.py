"""Routers in closed form: each one predicts what skipping a unit costs, in nats.

So scores of different layers are comparable, and one threshold for all skips what is cheapest. No
router is trained (docs/lab.md says how this compares with straight-through training).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megaskip.calibration.cost_regression import CostRegression, LinearCost
from megaskip.calibration.finite import sum_of_finite
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.unit_costs import deal_groups, measure_costs, read_by_routers
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.routing import AffineRouter, RouterSet

SAVED_EVERY = 8
"""Batches of each rank, as in a fit of maps; each takes many passes here."""
_SUMS, _COSTS = "sums of costs", "costs"
_NUMBERS = ("bias", "mean", "spread", "explained")
"""Of a LinearCost."""


def fit_routers(
    engine: Engine,
    batches: Sequence[Batch | None],
    *,
    groups: int,
    distill: float = 1.0,
    seed: int = 0,
    check: Callable[[], object] = lambda: None,
    progress: FitProgress | None = None,
) -> dict[int, LinearCost]:
    """Fill the routers of all routed layers from `batches` of all ranks, as many on each; return
    by layer what was fitted.

    The `batches` of a rank are every n-th of those of all n replicas, so that any number of ranks
    fits the same. Each takes a forward and a backward pass for each of `groups` of layers, which
    skip together: about one over the share that is to be skipped. `distill` is the share of each
    label that is the dense model's prediction: its costs scatter less than those of the text.
    `check` is called before each batch. With `progress` it goes on from where that stands, and
    keeps it up.
    Collective. Raises ConfigError for other routers than affine ones, and without text,
    MegaskipError for costs that are not finite.
    """
    routers = engine.routers
    if routers.config.router != "affine":
        raise ConfigError(
            f"--router {routers.config.router} cannot predict costs; take affine, whose bias says "
            "what a layer is worth"
        )
    require_enough(engine, batches)
    if progress is not None and _COSTS in progress.results:
        fitted = _restored(routers, progress)
    else:
        fits = _regressions(
            engine, batches, groups, distill=distill, seed=seed, check=check, progress=progress
        )
        fitted = {
            layer: fit.solve(sum_of_finite(f"what skipping layer {layer} costs"))
            for layer, fit in fits.items()
        }
        if progress is not None:
            _keep(fitted, progress)
    _fill(engine, fitted)
    return fitted


def require_enough(engine: Engine, batches: Sequence[Batch | None]) -> None:
    """Raise ConfigError where `batches` of each rank are too little text for fit_routers."""
    everywhere = len(batches) * engine.num_replicas
    if everywhere < 2:
        raise ConfigError(
            f"{everywhere} batch of text is too little to fit routers on: half of it judges what "
            "is fitted to the other half; give more --data or --cost_rows"
        )


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


def _regressions(
    engine: Engine,
    batches: Sequence[Batch | None],
    groups: int,
    *,
    distill: float,
    seed: int,
    check: Callable[[], object],
    progress: FitProgress | None,
) -> dict[int, CostRegression]:
    """Return by layer the regression that has seen the costs of all batches. Collective."""
    routers = engine.routers
    fits = {
        layer: CostRegression(routers.hidden_size, seed=layer, device=engine.device)
        for layer in routers.layers
    }
    done = 0
    if progress is not None and progress.stage == _SUMS:
        for fit in fits.values():
            fit.skip_choice()
        progress.restore_sums(fits)
        done = progress.batches
    else:
        _choose_features(engine, batches, fits)
    for turn, batch in enumerate(batches):
        if turn < done:
            continue
        check()
        number = engine.number_over_replicas(turn)

        def observe(layer: int, read: Tensor, costs: Tensor, half: int = number % 2) -> None:
            fits[layer].observe(read, costs, half=half)

        dealt = deal_groups(routers.layers, groups, seed + number)
        measure_costs(engine, batch, dealt, observe, distill=distill, seed=seed + number)
        if progress is not None and (turn + 1) % SAVED_EVERY == 0:
            progress.keep_sums(_SUMS, turn + 1, fits)
    return fits


def _keep(fitted: Mapping[int, LinearCost], progress: FitProgress) -> None:
    """Write what was fitted. Collective."""
    numbers = {
        str(layer): {name: getattr(cost, name) for name in _NUMBERS}
        for layer, cost in fitted.items()
    }
    weights = {f"{layer}.cost": cost.weight for layer, cost in fitted.items()}
    progress.keep_result(_COSTS, numbers, weights)


def _restored(routers: RouterSet, progress: FitProgress) -> dict[int, LinearCost]:
    """Return what an earlier start has fitted. Collective."""
    size = routers.hidden_size
    weights = {layer: torch.zeros(size, dtype=torch.float64) for layer in routers.layers}
    progress.restore_fitted({f"{layer}.cost": weight for layer, weight in weights.items()})
    numbers = progress.results[_COSTS]
    return {layer: LinearCost(weight=weights[layer], **numbers[str(layer)]) for layer in weights}


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
    for layer, fit in fits.items():
        fit.choose_features(sum_of_finite(f"what the router of layer {layer} reads"))


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
