"""The loss of each unit of a batch, measured with an engine.

Shapes: B rows, T tokens, U units of decision in a row.
"""

import torch
from torch import Tensor

from megaskip.data import Batch
from megaskip.labels import IGNORED
from megaskip.parallel.engine import Engine


@torch.no_grad()
def unit_losses(engine: Engine, batch: Batch | None) -> Tensor:
    """Return the summed loss of each unit's tokens, float32 [B, U]: of `batch`, or of one that
    counts for nothing. Collective; without pipeline stages."""
    ran, losses = engine.token_losses(batch)
    decision = next(iter(engine.own_decisions().values()))
    rows, units = decision.unit_mask.shape
    unit = torch.arange(rows, device=losses.device)[:, None].expand_as(ran.labels) * units
    if decision.unit_of_token is not None:
        unit = unit + decision.unit_of_token
    unit = unit[:, 1:][ran.labels[:, 1:] != IGNORED]
    return losses.new_zeros(rows * units).index_add_(0, unit, losses).view(rows, units)
