"""How much of an asked capacity each layer gets: more where skipping costs more, as measured.

Training compares units of one layer, so that each learns which of its own matter. Whether one layer
matters more than another is measured afterwards, on calibration text.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaskip.calibration.cost_model import SkipCostModel
from megaskip.calibration.finite import require_finite
from megaskip.calibration.similarity import UpdateSimilarity
from megaskip.calibration.threshold import TOLERANCE, calibrate_threshold, quantile
from megaskip.calibration.unit_losses import unit_losses
from megaskip.config import RouterConfig
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet


class UnreachedError(ConfigError):
    """The routers keep another share than the asked one, at every threshold that was tried."""


def allocate(
    engine: Engine,
    batches: Sequence[Batch | None],
    capacity: float,
    *,
    rounds: int,
    near: RouterConfig | None = None,
    progress: Callable[[], object] = lambda: None,
) -> float:
    """Give each routed layer its own threshold, so that the loss of `batches` of all ranks is lower
    at `capacity`; return the capacity that they come to. Collective.

    The start is the better of two: the thresholds that the routers have, and a static drop of the
    layers that change their input least (LLM-Drop, arXiv 2406.15786).

    Each round measures what skipping costs in every layer, and tries the thresholds that these
    costs suggest twice: once with the routers' order of the units of a layer, once without it
    (whole layers). If neither is better, the next round goes half as far, because costs are those
    of one unit at a time and do not add up when much is skipped. Costs are measured at the best
    thresholds so far; in the first round at those of `near`, which were allocated for a capacity
    close to this one.

    Thresholds are taken when their loss is lower by more than the standard error of the difference
    over units (the one-standard-error rule): otherwise they may fit this text only.

    A round costs R + 1 forward passes over `batches` for R routed layers, and two searches for the
    capacity; the static drop costs one pass and one search. `progress` is called once a round.
    Raises ConfigError for decisions per token.
    """
    routers = engine.routers
    require_rounds(routers.config, rounds)
    routers.configure(routers.settled_config())
    best = _BestThresholds(engine, batches, capacity)
    if rounds:
        best.consider(*_static_drop(engine, batches, capacity))
    measure_at, measured_at, step = near or best.config, None, 1.0
    for _ in range(rounds):
        if measured_at is not measure_at:
            routers.configure(measure_at)
            measured_at, step, (logits, costs) = measure_at, 1.0, skip_costs(engine, batches)
            present = _shares_above(logits, routers)
        for trust in (1.0, 0.0):
            cost_model = SkipCostModel.fit(logits, costs, trust=trust)
            wanted = _cheapest_shares(logits, cost_model, capacity)
            best.consider(logits, present + step * (wanted - present))
        measure_at, step = best.config, step / 2
        progress()
    routers.configure(best.config)
    return best.kept


def require_rounds(config: RouterConfig, rounds: int) -> None:
    """Raise ConfigError for a number below 0, and for rounds with decisions per token, whose costs
    are not measured one by one."""
    if rounds < 0:
        raise ConfigError(f"--allocate {rounds} must be a number of rounds, 0 or more")
    if rounds and config.unit == "token":
        raise ConfigError(
            "layers get their own thresholds for decisions per sequence, not for "
            f"{config.granularity}: calibrate without --allocate"
        )


class _BestThresholds:
    """The thresholds of lowest loss, of those considered that keep the capacity."""

    def __init__(self, engine: Engine, batches: Sequence[Batch | None], capacity: float) -> None:
        """Begin with the thresholds that the routers have. Collective, as is `consider`."""
        self._engine, self._batches, self._capacity = engine, batches, capacity
        self._routers = engine.routers
        self.config = self._routers.config
        self._losses, self.kept = _unit_losses(engine, batches)

    def consider(self, logits: Tensor, shares: Tensor) -> None:
        """Try the thresholds that `shares` [R] of the layers' `logits` [R, N] are above; all are
        moved by the same amount until they keep the capacity. Collective."""
        thresholds = [
            _above(row, share) for row, share in zip(logits, shares.tolist(), strict=True)
        ]
        self._routers.place(thresholds)
        calibrate_threshold(self._engine, self._batches, capacity=self._capacity)
        self._routers.configure(self._routers.settled_config())
        losses, kept = _unit_losses(self._engine, self._batches)
        # A start that keeps something else is no rival: it may lose less because it keeps more.
        better = not self._is_near(self.kept) or _is_lower(losses, self._losses)
        if self._is_near(kept) and better:
            self.config, self._losses, self.kept = self._routers.config, losses, kept

    def _is_near(self, kept: float) -> bool:
        return abs(kept - self._capacity) <= TOLERANCE


def _cheapest_shares(logits: Tensor, cost_model: SkipCostModel, capacity: float) -> Tensor:
    """Return the share of each layer's units that runs, float64 [R], when the units whose skipping
    costs least are skipped, `capacity` of all being kept."""
    costs = cost_model.predict(logits)
    return (costs >= quantile(costs.flatten(), 1 - capacity)).double().mean(1)


def _shares_above(logits: Tensor, routers: RouterSet) -> Tensor:
    """Return the share of each layer's units that is above its threshold, float64 [R]."""
    present = torch.tensor(list(routers.thresholds.logits.values()), dtype=torch.float64)
    return (logits > present[:, None]).double().mean(1)


def _above(logits: Tensor, share: float) -> float:
    """Return the threshold, in logits, that `share` of the logits [N] are above."""
    if round(share * len(logits)) in (0, len(logits)):  # all or none, of other text, too
        return math.inf if share < 0.5 else -math.inf
    return quantile(logits, 1 - share)


def _static_drop(
    engine: Engine, batches: Sequence[Batch | None], capacity: float
) -> tuple[Tensor, Tensor]:
    """Return (logits of all units of all ranks' `batches`, float64 [R, N], the share of each
    layer's units that a static drop keeps, float64 [R]): 1 for the layers that change their input
    most, 0 for the others. Collective."""
    routers = engine.routers
    logits = [torch.zeros(len(routers.layers), 0, dtype=torch.float64)]
    similarity = UpdateSimilarity(engine.model, routers.config.target, routers.layers)
    with routers.disabled(), similarity.watching():
        for batch in batches:
            similarity.set_batch(batch.token_mask if batch is not None else None)
            unit_losses(engine, batch)
            if batch is not None:
                rows = [each.logit[each.unit_mask] for each in routers.decisions().values()]
                logits.append(torch.stack(rows).double().cpu())
    mine = torch.cat(logits, dim=1), similarity.sums[list(routers.layers)]
    everywhere = gather_from_ranks(mine)
    sums = torch.stack([sums_of_rank for _, sums_of_rank in everywhere]).sum(0)
    order = sums.argsort().argsort()  # 0 changes its input most
    shares = (capacity * len(order) - order).clamp(0, 1)
    return torch.cat([logits_of_rank for logits_of_rank, _ in everywhere], dim=1), shares


def _unit_losses(engine: Engine, batches: Sequence[Batch | None]) -> tuple[Tensor, float]:
    """Return (summed loss of each unit of all ranks' `batches`, float64 [N], the share of the
    routed units that ran). Collective."""
    losses, keep = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0)]
    for batch in batches:
        by_unit = unit_losses(engine, batch)
        if batch is not None:
            decisions = list(engine.routers.decisions().values())
            losses.append(by_unit[decisions[0].unit_mask].double().cpu())
            keep += [decision.keep[decision.unit_mask].cpu() for decision in decisions]
    everywhere = gather_from_ranks((torch.cat(losses), torch.cat(keep)))
    kept = torch.cat([kept_of_rank for _, kept_of_rank in everywhere])
    of_all = torch.cat([loss for loss, _ in everywhere])
    require_finite(of_all, "the loss of the calibration text")
    return of_all, float(kept.double().mean())


def _is_lower(losses: Tensor, others: Tensor) -> bool:
    """Return whether the mean of `losses` [N] is below that of `others` [N] by more than the
    standard error of the paired difference."""
    gap = others - losses
    return float(gap.mean()) > float(gap.std(correction=0)) / math.sqrt(len(gap))


def skip_costs(engine: Engine, batches: Sequence[Batch | None]) -> tuple[Tensor, Tensor]:
    """Return (logits, costs) of all units of all ranks' `batches`, float64 [R, N], R routed
    layers; for decisions per sequence, without pipeline stages. Collective.

    The cost of a unit is what skipping it adds to the summed loss of its tokens, in nats. It is
    measured by running the batch once more with the layer's decisions reversed, while all other
    layers decide by themselves.
    """
    mine = [torch.zeros(2, len(engine.routers.layers), 0, dtype=torch.float64)]
    for batch in batches:
        measured = _skip_costs(engine, engine.routers, batch)
        if batch is not None:
            mine.append(measured)
    logits, costs = torch.cat(gather_from_ranks(torch.cat(mine, dim=2)), dim=2)
    return logits, costs


def _skip_costs(engine: Engine, routers: RouterSet, batch: Batch | None) -> Tensor:
    """Return the logits and costs of one batch's units, float64 [2, R, N]."""
    before = unit_losses(engine, batch)
    decisions, columns = routers.decisions(), []
    for layer, decision in decisions.items():
        with routers.override({layer: 1 - decision.keep}):
            cost = (unit_losses(engine, batch) - before) * (2 * decision.keep - 1)
        columns.append(torch.stack([decision.logit, cost])[:, decision.unit_mask].double().cpu())
    return torch.stack(columns, dim=1)
