"""The threshold at which a text keeps an asked capacity, found with forward passes of an engine."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaskip.calibration.search import ThresholdSearch
from megaskip.data import Batch
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.parallel.engine import Engine

_CALIBRATED = 0.002
"""Distance from the asked capacity at which calibration stops."""
_ENOUGH = 2**21
"""Logits of all ranks that a quantile is taken of: its error is then a few ten-thousandths."""


@torch.no_grad()
def calibrate_threshold(
    engine: Engine,
    batches: Sequence[Batch | None],
    *,
    capacity: float | None = None,
    rounds: int = 4,
    check: Callable[[], object] = lambda: None,
) -> float:
    """Put the threshold where `batches` of all ranks keep `capacity` (the asked one without it);
    returns what they keep. Collective.

    Repeated, because a layer's decision changes what the layers above it read (see
    ThresholdSearch). `check` as in Engine.forwards.
    """
    budget = engine.routers.steering.budget
    target = engine.routers.config.capacity if capacity is None else capacity
    search = ThresholdSearch(target)
    for last in [False] * rounds + [True]:
        if last:
            budget.place(search.best)
        kept, above = decide_all(engine, batches, check)
        search.note(budget.offset, kept)
        if last or search.distance <= _CALIBRATED:
            break
        budget.place(search.next(quantile(above, 1 - target)))
    return kept


@torch.no_grad()
def decide_all(
    engine: Engine, batches: Sequence[Batch | None], check: Callable[[], object] = lambda: None
) -> tuple[float, Tensor]:
    """Return (share kept, how far real units' logits are above the layer's own threshold,
    float32 [N]: all, or evenly chosen ones of very many) over the batches of all ranks.
    Collective."""
    sums, above = torch.zeros(2, dtype=torch.float64), [torch.zeros(0)]
    for batch, _ in engine.forwards(batches, check):
        decisions = engine.own_decisions() if batch is not None else {}
        for layer, decision in decisions.items():
            logit = decision.logit[decision.unit_mask].cpu()
            above.append(logit - engine.routers.thresholds.logits[layer])
            sums += torch.tensor([float(decision.kept().detach()), float(decision.units())])
    mine = torch.cat(above)
    step = -(-len(mine) * engine.world_size // _ENOUGH) or 1
    everywhere = gather_from_ranks((sums, mine[::step]))
    kept, units = torch.stack([of_rank for of_rank, _ in everywhere]).sum(0).tolist()
    return kept / max(units, 1.0), torch.cat([logits for _, logits in everywhere])


def quantile(values: Tensor, share: float) -> float:
    """Return the middle between the two values that `share` of all lie below; any size of [N]."""
    ordered = values.double().sort().values
    at = round(share * len(ordered))
    below, above = ordered[max(at - 1, 0)], ordered[min(at, len(ordered) - 1)]
    return float(below + above) / 2
