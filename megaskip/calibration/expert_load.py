"""How many tokens each expert of a mixture is given, and how many it runs.

Shapes: R routed layers, E experts of a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.checkpoint.atomic import write_json
from megaskip.data import Batch
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.parallel.engine import Engine

FILE = "expert_load.json"
"""Beside the routers, with a picture for each capacity."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLoad:
    """Tokens by expert, of all ranks' text."""

    layers: tuple[int, ...]
    assigned: Tensor
    """float64 [R, E], tokens that the mixture's own router gives to an expert."""
    ran: Tensor
    """float64 [R, E], those of them that the expert ran."""

    def describe(self) -> str:
        """Return how uneven the load is before and after, in one line."""
        mean = self.assigned.mean(1).clamp(min=1e-9)
        before, after = (float((x.amax(1) / mean).mean()) for x in (self.assigned, self.ran))
        idle = int(((self.ran == 0) & (self.assigned > 0)).sum())
        return (
            f"busiest expert of a layer: {before:.2f} of the mean load assigned, {after:.2f} ran "
            f"(mean over layers); {idle} of {self.ran.numel()} experts run none of their tokens"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by layer, a list of experts each."""
        tables = {"assigned": self.assigned, "ran": self.ran}
        return {
            name: {str(k): row for k, row in zip(self.layers, table.tolist(), strict=True)}
            for name, table in tables.items()
        }


def write_loads(folder: Path, loads: Mapping[float, ExpertLoad]) -> None:
    """Write expert_load.json with the loads by capacity, and a picture of each capacity's."""
    from megaskip.reporting.expert_load import draw_expert_load  # needs an extra

    write_json(folder / FILE, {f"{c:g}": load.to_json() for c, load in loads.items()})
    for capacity, load in loads.items():
        draw_expert_load(
            load.assigned.numpy(),
            load.ran.numpy(),
            load.layers,
            folder / f"expert_load_{capacity:g}.png",
            title=f"tokens by expert, at capacity {capacity:g}",
        )


@torch.no_grad()
def measure_load(engine: Engine, batches: Sequence[Batch | None]) -> ExpertLoad:
    """Return the load of all experts over the real tokens of all ranks' `batches`, as many on each
    rank, at the thresholds that are set. Collective."""
    routers = engine.routers
    assert routers.experts is not None, "experts are what is skipped"
    shape = (2, len(routers.layers), routers.experts.count)
    totals = torch.zeros(shape, dtype=torch.float64, device=engine.device)
    at = {layer: position for position, layer in enumerate(routers.layers)}
    with routers.steering.budget.settled():
        for batch, _ in engine.forwards(batches):
            # A placeholder, or decisions of other stages, count for nothing.
            for layer, decision in engine.own_decisions().items() if batch is not None else ():
                assert decision.expert is not None
                real, count = decision.unit_mask, shape[-1]
                expert, keep = decision.expert[real], decision.keep[real].double()
                totals[0, at[layer]] += torch.bincount(expert, minlength=count)
                totals[1, at[layer]] += torch.bincount(expert, weights=keep, minlength=count)
    sum_over_ranks(totals)
    assigned, ran = totals.cpu()
    return ExpertLoad(layers=routers.layers, assigned=assigned, ran=ran)
