"""What skipping a unit costs, predicted from its logit and layer. Pure arithmetic.

Shapes: R routed layers, N units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SLOPE = 1e-3
"""Share of the largest mean cost. A slope of 0 would leave the units of a layer without order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCostModel:
    """For each layer a line from a unit's logit to the cost of skipping it, in nats.

    Training orders the logits of one layer, but not those of two layers, whose routers are
    independent. Predicted costs can be compared between layers.
    """

    slope: Tensor
    """float64 [R], above 0."""
    intercept: Tensor
    """float64 [R]."""

    @classmethod
    def fit(cls, logits: Tensor, costs: Tensor, *, trust: float = 1.0) -> "SkipCostModel":
        """Return the least-squares lines through float64 [R, N] points, with shrunken slopes.

        A slope is multiplied by 1 - (error / slope)^2 (James-Stein): one that is not larger than
        its standard error is noise, and a layer whose logits say nothing about costs is then run or
        skipped as a whole, by its mean cost. `trust` is a factor on all slopes; with 0 every layer
        is run or skipped as a whole.
        """
        middle, spread = logits.mean(1, keepdim=True), logits.std(1, keepdim=True)
        spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        at, mean = (logits - middle) / spread, costs.mean(1, keepdim=True)
        slope = (at * (costs - mean)).mean(1, keepdim=True)
        error = (costs - mean - slope * at).square().mean(1, keepdim=True) / logits.shape[1]
        shrunk = slope.clamp(min=0) * (1 - error / slope.square().clamp(min=1e-30)).clamp(min=0)
        least = max(_LEAST_SLOPE * float(mean.abs().max()), 1e-12)
        slope = (trust * shrunk).clamp(min=least) / spread
        return cls(slope=slope.squeeze(1), intercept=(mean - slope * middle).squeeze(1))

    def predict(self, logits: Tensor) -> Tensor:
        """Return the predicted cost of skipping each unit, float64 [R, N], of `logits` [R, N]."""
        return self.slope[:, None] * logits + self.intercept[:, None]
