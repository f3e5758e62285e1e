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

from megaskip.calibration.cost_model import SkipCostModel
from megaskip.calibration.similarity import UpdateSimilarity
from megaskip.calibration.threshold import calibrate_threshold, quantile
from megaskip.calibration.unit_losses import unit_losses
from megaskip.config import RouterConfig
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet

TOLERANCE = 0.01
"""How far a capacity may be from the asked one."""


class UnreachedError(ConfigError):
    """Routers keep something else than what is asked, at every threshold."""


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

    Begins at the thresholds that the routers have, or with the static drop of whole layers that
    change their input least (LLM-Drop, arXiv 2406.15786) where that loses less. A round tries what
    the costs of skipping say is best, for routers that are trusted and for routers that are not
    (whole layers again), or half as far when that lost more: costs are those of one unit at a time,
    and do not add up when much is skipped. They are measured beside the best decisions so far, in
    the first round beside those of `near`, which has thresholds allocated for a capacity next to
    this one. Thresholds are taken when their loss is lower by more than the standard error of the
    difference over units (the one-standard-error rule): what only fits these very texts is worse on
    others. A round costs R + 1 forward passes, and those of two searches for the capacity; the
    static drop one, and those of one search.
    Raises ConfigError for decisions per token.
    """
    routers = engine.routers
    assert routers is not None
    require_rounds(routers.config, rounds)
    routers.configure(routers.settled_config())
    found = _Best(engine, batches, capacity)
    if rounds:
        found.consider(*_static_drop(engine, batches, capacity))
    beside, measured, step = near or found.config, None, 1.0
    for _ in range(rounds):
        if measured is not beside:
            routers.configure(beside)
            measured, step, (logits, costs) = beside, 1.0, skip_costs(engine, batches)
            present = _shares_above(logits, routers)
        for trust in (1.0, 0.0):
            best = _shares_worth(logits, SkipCostModel.fit(logits, costs, trust=trust), capacity)
            found.consider(logits, present + step * (best - present))
        beside, step = found.config, step / 2
        progress()
    routers.configure(found.config)
    return found.kept


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


class _Best:
    """The thresholds at which a text loses least, of those considered that keep a capacity."""

    def __init__(self, engine: Engine, batches: Sequence[Batch | None], capacity: float) -> None:
        """Begin with the thresholds that the routers have. Collective, as is `consider`."""
        assert engine.routers is not None
        self._engine, self._batches, self._capacity = engine, batches, capacity
        self._routers = engine.routers
        self.config = self._routers.config
        self._losses, self.kept = _unit_losses(engine, batches)

    def consider(self, logits: Tensor, shares: Tensor) -> None:
        """Try the thresholds that `shares` [R] of the layers' `logits` [R, N] are above, moved
        together to where they keep the capacity."""
        places = [_above(row, share) for row, share in zip(logits, shares.tolist(), strict=True)]
        self._routers.place(places)
        calibrate_threshold(self._engine, self._batches, capacity=self._capacity)
        self._routers.configure(self._routers.settled_config())
        losses, kept = _unit_losses(self._engine, self._batches)
        # A start that keeps something else is no rival: it may lose less because it keeps more.
        better = not self._is_near(self.kept) or _is_lower(losses, self._losses)
        if self._is_near(kept) and better:
            self.config, self._losses, self.kept = self._routers.config, losses, kept

    def _is_near(self, kept: float) -> bool:
        return abs(kept - self._capacity) <= TOLERANCE


def _shares_worth(logits: Tensor, lines: SkipCostModel, capacity: float) -> Tensor:
    """Return the shares of the layers' units [R] that make the `capacity` worth most."""
    worth = lines.of(logits)
    return (worth >= quantile(worth.flatten(), 1 - capacity)).double().mean(1)


def _shares_above(logits: Tensor, routers: RouterSet) -> Tensor:
    """Return the shares of the layers' units [R] that are above their thresholds."""
    present = torch.tensor(list(routers.threshold_logits.values()), dtype=torch.float64)
    return (logits > present[:, None]).double().mean(1)


def _above(logits: Tensor, share: float) -> float:
    """Return the threshold that `share` of the logits [N] are above."""
    if round(share * len(logits)) in (0, len(logits)):  # all or none, of other text, too
        return math.inf if share < 0.5 else -math.inf
    return quantile(logits, 1 - share)


def _static_drop(
    engine: Engine, batches: Sequence[Batch | None], capacity: float
) -> tuple[Tensor, Tensor]:
    """Return (logits of all units of all ranks' `batches`, float64 [R, N], the shares of the
    layers' units [R] that a static drop keeps): all of those that change most what they read.
    Collective."""
    routers = engine.routers
    assert routers is not None
    logits = [torch.zeros(len(routers.layers), 0, dtype=torch.float64)]
    seen = UpdateSimilarity(engine.module.model, routers.config.target, routers.layers)
    with routers.disabled(), seen.watching():
        for batch in batches:
            seen.set_batch(batch.token_mask if batch is not None else None)
            unit_losses(engine, batch)
            if batch is not None:
                units = [one.logit[one.unit_mask] for one in routers.decisions().values()]
                logits.append(torch.stack(units).double().cpu())
    everywhere = _of_all_ranks((torch.cat(logits, dim=1), seen.sums[list(routers.layers)]))
    similarity = torch.stack([sums for _, sums in everywhere]).sum(0)
    rank = similarity.argsort().argsort()  # 0 changes most
    shares = (capacity * len(rank) - rank).clamp(0, 1)
    return torch.cat([of_rank for of_rank, _ in everywhere], dim=1), shares


def _unit_losses(engine: Engine, batches: Sequence[Batch | None]) -> tuple[Tensor, float]:
    """Return (summed loss of each unit of all ranks' `batches`, float64 [N], the share that they
    keep). Collective."""
    assert engine.routers is not None
    losses, keep = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
    for batch in batches:
        found = unit_losses(engine, batch)
        if batch is not None:
            decisions = list(engine.routers.decisions().values())
            losses.append(found[decisions[0].unit_mask].double().cpu())
            keep += [one.keep[one.unit_mask].cpu() for one in decisions]
    everywhere = _of_all_ranks((torch.cat(losses), torch.cat(keep)))
    shares = torch.cat([kept for _, kept in everywhere])
    return torch.cat([loss for loss, _ in everywhere]), float(shares.double().mean())


def _of_all_ranks(mine: Any) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return everywhere


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
    logits, costs = torch.cat(_of_all_ranks(torch.cat(mine, dim=2)), dim=2)
    return logits, costs


def _skip_costs(engine: Engine, routers: RouterSet, batch: Batch | None) -> Tensor:
    """Return the logits and costs of one batch's units, float64 [2, R, N]."""
    before = unit_losses(engine, batch)
    decided, columns = routers.decisions(), []
    for layer, one in decided.items():
        with routers.override({layer: 1 - one.keep}):
            change = (unit_losses(engine, batch) - before) * (2 * one.keep - 1)
        columns.append(torch.stack([one.logit, change])[:, one.unit_mask].double().cpu())
    return torch.stack(columns, dim=1)
