"""How much of an asked capacity each layer gets: more where skipping costs more, as measured.

Training holds all layers level, so that each learns which of its units matter. Whether one layer
matters more than another is measured afterwards, on calibration text.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.config import RouterConfig
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine, quantile
from megaskip.routing import RouterSet, Worth

TOLERANCE = 0.01
"""How far a capacity may be from the asked one."""


def allocate(
    engine: Engine,
    batches: Sequence[Batch | None],
    capacity: float,
    *,
    rounds: int,
    near: RouterConfig | None = None,
    progress: Callable[[], object] = lambda: None,
) -> float:
    """Give each routed layer its own threshold, so that `batches` of all ranks lose less when
    they keep `capacity`; returns what they keep. Collective.

    Begins at the thresholds that the routers have. A round tries what the costs of skipping say is
    best, for routers that are trusted and for routers that are not (whole layers, as in a static
    drop), or half as far when that lost more: costs are those of one unit at a time, and do not
    add up when much is skipped. They are measured beside the best decisions so far, in the first
    round beside those of `near`, which has thresholds allocated for a capacity next to this one.
    Thresholds are taken when their loss is lower by more than the standard error of the difference
    over units (the one-standard-error rule): what only fits these very texts is worse on others. A
    round costs R + 1 forward passes, and those of two searches for the capacity.
    Raises ConfigError for decisions per token.
    """
    routers = engine.routers
    assert routers is not None
    require_rounds(routers.config, rounds)
    routers.configure(routers.settled_config())
    best, (losses, kept) = routers.config, _unit_losses(engine, batches)
    beside, measured, step = near or best, None, 1.0
    for _ in range(rounds):
        if measured is not beside:
            routers.configure(beside)
            present = list(routers.threshold_logits.values())
            measured, step, costs = beside, 1.0, skip_costs(engine, batches)
        for trust in (1.0, 0.0):
            worth = Worth.fit(*costs, trust=trust)
            routers.place(_thresholds(costs[0], worth, capacity, present, step))
            engine.calibrate(batches, capacity=capacity)
            routers.configure(routers.settled_config())
            found, share = _unit_losses(engine, batches)
            if abs(share - capacity) <= TOLERANCE and _is_lower(found, losses):
                best, losses, kept = routers.config, found, share
        beside, step = best, step / 2
        progress()
    routers.configure(best)
    return kept


def require_rounds(config: RouterConfig, rounds: int) -> None:
    """Raise ConfigError where so many rounds cannot be done: the costs of tokens are not measured
    one by one."""
    if rounds < 0:
        raise ConfigError(f"--allocate {rounds} must be a number of rounds, 0 or more")
    if rounds and config.unit == "token":
        raise ConfigError(
            "layers get their own thresholds for decisions per sequence, not for "
            f"{config.granularity}: calibrate without --allocate"
        )


def _thresholds(
    logits: Tensor, lines: Worth, capacity: float, present: Sequence[float], step: float
) -> list[float]:
    """Return each layer's threshold, in logits: a `step` from the share of its units that is above
    the `present` one towards the share that is worth most."""
    worth = lines.of(logits)
    best = (worth >= quantile(worth.flatten(), 1 - capacity)).double().mean(1)
    above = logits > torch.tensor(present, dtype=torch.float64)[:, None]
    now = above.double().mean(1)
    wanted = (now + step * (best - now)).tolist()
    return [_above(of_layer, share) for of_layer, share in zip(logits, wanted, strict=True)]


def _above(logits: Tensor, share: float) -> float:
    """Return the threshold that `share` of the logits [N] are above."""
    if round(share * len(logits)) in (0, len(logits)):  # all or none, of other text, too
        return math.inf if share < 0.5 else -math.inf
    return quantile(logits, 1 - share)


def _unit_losses(engine: Engine, batches: Sequence[Batch | None]) -> tuple[Tensor, float]:
    """Return (summed loss of each unit of all ranks' `batches`, float64 [N], the share that they
    keep). Collective."""
    assert engine.routers is not None
    losses, keep = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
    for batch in batches:
        found = engine.unit_losses(batch)
        if batch is not None:
            decisions = list(engine.routers.decisions().values())
            losses.append(found[decisions[0].unit_mask].double().cpu())
            keep += [one.keep[one.unit_mask].cpu() for one in decisions]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (torch.cat(losses), torch.cat(keep)))
    shares = torch.cat([kept for _, kept in everywhere])
    return torch.cat([loss for loss, _ in everywhere]), float(shares.double().mean())


def _is_lower(losses: Tensor, others: Tensor) -> bool:
    """Return whether the mean of [N] is lower by more than the error of the paired difference."""
    gap = others - losses
    return float(gap.mean()) > float(gap.std(correction=0)) / math.sqrt(len(gap))


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
