"""How much of an asked capacity each layer gets: more where skipping costs more, as measured.

Training holds all layers level, so that each learns which of its units matter. Whether one layer
matters more than another is measured afterwards, on calibration text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import CALIBRATED, Engine, quantile
from megaskip.parallel.results import EvalResult
from megaskip.routing import RouterSet, ThresholdSearch, Worth

_TRIES = 6
TOLERANCE = 0.01
"""How far a capacity may be from the asked one."""


def allocate(
    engine: Engine,
    batches: Sequence[Batch | None],
    capacity: float,
    *,
    rounds: int,
    progress: Callable[[], object] = lambda: None,
) -> float:
    """Give each routed layer its own threshold, so that `batches` of all ranks lose least when
    they keep `capacity`; returns what they keep. Collective.

    The thresholds that the routers have now are where it begins, and what it returns to when
    nothing found has a lower loss. A round costs R + 1 forward passes and those of a search.
    Raises ConfigError for decisions per token: their costs are not measured one by one.
    """
    routers = engine.routers
    assert routers is not None
    if routers.config.unit == "token":
        raise ConfigError(
            "layers get their own thresholds for decisions per sequence, not for "
            f"{routers.config.granularity}: calibrate without --allocate"
        )
    routers.configure(routers.settled_config())
    best, kept = routers.config, engine.evaluate(batches, routed=True)
    for _ in range(rounds):
        found = _round(engine, routers, batches, capacity)
        if abs(found.capacity - capacity) <= TOLERANCE and found.loss < kept.loss:
            best, kept = routers.config, found
        progress()
    routers.configure(best)
    return kept.capacity


def skip_costs(engine: Engine, batches: Sequence[Batch | None]) -> tuple[Tensor, Tensor]:
    """Return (logits, costs) of all units of all ranks' `batches`, float64 [R, N], R routed
    layers; for decisions per sequence, without pipeline stages. Collective.

    A cost is what skipping the unit adds to the summed loss of its tokens, measured by running
    the batch with the layer's decisions turned around; all other layers decide by themselves.
    """
    assert engine.routers is not None
    mine = [torch.zeros(2, len(engine.routers.layers), 0, dtype=torch.float64)]
    for batch in batches:
        found = _skip_costs(engine, engine.routers, batch)
        if batch is not None:
            mine.append(found)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, torch.cat(mine, dim=2))
    logits, costs = torch.cat(everywhere, dim=2)
    return logits, costs


def _skip_costs(engine: Engine, routers: RouterSet, batch: Batch | None) -> Tensor:
    """Return the logits and costs of one batch's units, float64 [2, R, N]."""
    before = engine.unit_losses(batch)
    decided, columns = routers.decisions(), []
    try:
        for layer, one in decided.items():
            routers.force({layer: 1 - one.keep})
            change = (engine.unit_losses(batch) - before) * (2 * one.keep - 1)
            columns.append(torch.stack([one.logit, change])[:, one.unit_mask].double().cpu())
    finally:
        routers.force({})
    return torch.stack(columns, dim=1)


def _round(
    engine: Engine, routers: RouterSet, batches: Sequence[Batch | None], capacity: float
) -> EvalResult:
    """Place thresholds by what skipping costs beside the present decisions; returns what they
    do."""
    logits, costs = skip_costs(engine, batches)
    worth, search = Worth.fit(logits, costs), ThresholdSearch(capacity)
    price = quantile(worth.of(logits).flatten(), 1 - capacity)
    for _ in range(_TRIES):
        found = _at(engine, routers, batches, worth, price)
        search.note(price, found.capacity)
        if search.distance <= CALIBRATED:
            return found
        price = search.next(price)
    return _at(engine, routers, batches, worth, search.best)


def _at(
    engine: Engine,
    routers: RouterSet,
    batches: Sequence[Batch | None],
    worth: Worth,
    price: float,
) -> EvalResult:
    routers.place(worth.thresholds(price))
    return engine.evaluate(batches, routed=True)
