"""What running a unit is worth, by its logit and layer. Pure arithmetic.

Shapes: R routed layers, N units.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SLOPE = 1e-3
"""Of the largest mean cost: a layer whose logits say nothing still has an order of its units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCostModel:
    """A line for each layer: what a unit's logit says about the cost of skipping it.

    Logits of one layer are ranked by training, those of two layers are not: their routers never
    meet. The lines make them comparable.
    """

    slope: Tensor
    """float64 [R], above 0."""
    intercept: Tensor
    """float64 [R]."""

    @classmethod
    def fit(cls, logits: Tensor, costs: Tensor, *, trust: float = 1.0) -> "SkipCostModel":
        """Return the least-squares lines through float64 [R, N], their slopes drawn towards 0.

        A slope that is not larger than its error is noise. It is shrunk by 1 - (error / slope)^2
        (James-Stein), so a layer whose router knows nothing is run or skipped as a whole, by its
        mean cost. `trust` is a factor on all slopes: with 0 every layer is.
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

    def of(self, logits: Tensor) -> Tensor:
        """Return the worth of units with `logits` float64 [R, N], in nats."""
        return self.slope[:, None] * logits + self.intercept[:, None]
