"""The threshold at which a text keeps an asked capacity, found with forward passes of an engine."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megaskip.calibration.finite import not_finite
from megaskip.calibration.search import ThresholdSearch
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.routing import RouterSet, RoutingDecision

TOLERANCE = 0.01
"""How far a capacity may be from the asked one."""
_CALIBRATED = 0.002
"""Distance from the asked capacity at which calibration stops."""
_MORE_ROUNDS = 16
"""Tries of a search that shares what is left between two positions: about as many as halve 2^16
logits."""
_ENOUGH = 2**21
"""Logits of all ranks that a quantile is taken of: its error is then a few ten-thousandths."""

B = TypeVar("B")


class ForwardPasses(Protocol[B]):
    """What calibration needs of an engine: forward passes over batches of any kind, and decisions.

    Engine is one; integrations have others.
    """

    @property
    def routers(self) -> RouterSet: ...

    @property
    def world_size(self) -> int: ...

    def forwards(
        self, batches: Sequence[B | None], check: Callable[[], object] = ...
    ) -> Iterator[tuple[B | None, Tensor]]:
        """Yield each batch of this rank right after its forward pass. Collective."""
        ...

    def own_decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions that this rank made."""
        ...


@torch.no_grad()
def calibrate_threshold(
    engine: ForwardPasses[B],
    batches: Sequence[B | None],
    *,
    capacity: float | None = None,
    rounds: int = 4,
    check: Callable[[], object] = lambda: None,
) -> float:
    """Put the threshold where `batches` of all ranks keep `capacity` (the asked one without it);
    return what they keep. Collective.

    Repeated, because a layer's decisions change the input of the layers above it (see
    ThresholdSearch): a pass over `batches` in each of `rounds`, and more where these end further
    than TOLERANCE from the capacity. `check` as in Engine.forwards.
    """
    budget = engine.routers.steering.budget
    target = engine.routers.config.capacity if capacity is None else capacity
    search = ThresholdSearch(target)
    for last in [False] * rounds + [True]:
        if last:
            budget.place(search.best)
        kept, above = decide_all(engine, batches, check)
        search.note(float(budget.offset), kept)
        if last or search.distance <= _CALIBRATED:
            break
        budget.place(search.next(quantile(above, 1 - target)))
    if search.distance <= TOLERANCE:
        return kept
    return _narrow(engine, batches, search, above, check)


def _narrow(
    engine: ForwardPasses[B],
    batches: Sequence[B | None],
    search: ThresholdSearch,
    above: Tensor,
    check: Callable[[], object],
) -> float:
    """Go on with a search until nothing is left between its closest positions, and put the
    threshold at the best one; return what is kept there. `above` is of the last pass. Collective.
    """
    budget = engine.routers.steering.budget
    for _ in range(_MORE_ROUNDS):
        position = search.narrow(above.double().sort().values.tolist())
        if position is None or search.distance <= _CALIBRATED:
            break
        budget.place(position)
        kept, above = decide_all(engine, batches, check)
        search.note(float(budget.offset), kept)
    budget.place(search.best)
    return decide_all(engine, batches, check)[0]


@torch.no_grad()
def decide_all(
    engine: ForwardPasses[B],
    batches: Sequence[B | None],
    check: Callable[[], object] = lambda: None,
) -> tuple[float, Tensor]:
    """Return (share of the units that ran, float32 [N] by how much the logits of units are above
    their layer's threshold) over the batches of all ranks. Collective. Raises MegaskipError for
    logits that are not finite.

    The logits are those of all units, or of evenly chosen ones when there are very many.
    """
    sums, above = torch.zeros(3, dtype=torch.float64), [torch.zeros(0)]
    for batch, _ in engine.forwards(batches, check):
        decisions = engine.own_decisions() if batch is not None else {}
        for layer, decision in decisions.items():
            logit = decision.logit[decision.unit_mask].cpu()
            above.append(logit - engine.routers.thresholds.logits[layer])
            broken = float((~logit.isfinite()).sum())
            kept_units = float(decision.kept().detach())
            sums += torch.tensor([kept_units, float(decision.units()), broken])
    mine = torch.cat(above)
    step = -(-len(mine) * engine.world_size // _ENOUGH) or 1
    everywhere = gather_from_ranks((sums, mine[::step]))
    kept, units, broken = torch.stack([of_rank for of_rank, _ in everywhere]).sum(0).tolist()
    if broken:
        raise not_finite(f"{broken:,.0f} of {units:,.0f} logits of the routers")
    return kept / max(units, 1.0), torch.cat([logits for _, logits in everywhere])


def quantile(values: Tensor, share: float) -> float:
    """Return the number that `share` of `values` [N] lie below: the middle between two of them."""
    ordered = values.double().sort().values
    at = round(share * len(ordered))
    below, above = ordered[max(at - 1, 0)], ordered[min(at, len(ordered) - 1)]
    return float(below + above) / 2
