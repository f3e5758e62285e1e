"""How routers learn a capacity: thresholds that move, noise, and the gradient of a hard decision.

Training only. Shapes: B rows, U units of decision in a row.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megaskip.config import RouterConfig, RoutingConfig
from megaskip.routing.any_budget import AnyBudget
from megaskip.routing.budget import Budget
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.thresholds import Thresholds, threshold_of


def straight_through(
    logit: Tensor, threshold_logit: float | Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the 0/1 decision in float32 whose gradient is that of the score sigmoid(logit /
    temperature).

    The logits are compared, not the scores: in bfloat16 sigmoid(z) rounds to 0.5 for z in (-0.004,
    0]. Source: paper section 3 (straight-through estimator, dM/dR = 1).
    """
    hard = (logit.detach() >= threshold_logit).float()
    if not logit.requires_grad:
        return hard
    score = torch.sigmoid(logit / temperature)
    return hard + (score - score.detach())


class Steering(Thresholds):
    """The rule of training: a budget moves all thresholds alike, and decisions have a gradient."""

    def __init__(self, config: RouterConfig, layers: Sequence[int]) -> None:
        self.noise = 0.0
        """Spreads of the logits by which decisions are disturbed."""
        self.temperature = 1.0
        """Of the sigmoid that the gradient is taken of."""
        super().__init__(config, layers)

    def configure(self, config: RoutingConfig) -> None:
        """Take over thresholds and budget of `config`; what steering has learnt is forgotten."""
        assert isinstance(config, RouterConfig), "training has a budget"
        super().configure(config)
        self.budget = _budget(config)

    def keep(self, logit: Tensor, layer: int) -> Tensor:
        """Return which units of a layer run, float32 [B, U], with the gradient of their scores."""
        # The score is taken relative to the steered threshold: units near it have the largest
        # gradient.
        relative = self._disturbed(logit) - self.budget.offset
        return straight_through(relative, self.logits[layer], self.temperature)

    def penalty(
        self, decisions: Sequence[RoutingDecision], total_units: Tensor | float | None
    ) -> Tensor:
        """Return the share of these decisions in the penalty of `total_units`, a float32 scalar;
        without that number they are all."""
        kept = torch.stack([decision.kept() for decision in decisions])
        units = torch.stack([decision.units() for decision in decisions])
        return self.budget.penalty(kept, units, units.sum() if total_units is None else total_units)

    def settled(self, config: RouterConfig) -> RouterConfig:
        """Return `config` with the thresholds where steering has put them."""
        offset = self.budget.settled_offset()
        if not offset:
            return config
        moved = [threshold_of(logit + offset) for logit in self.logits.values()]
        alike = isinstance(config.threshold, float)
        return dataclasses.replace(config, threshold=moved[0] if alike else tuple(moved))

    def _disturbed(self, logit: Tensor) -> Tensor:
        """Return the logits [B, U] with logistic noise, `noise` spreads wide."""
        if not self.noise:
            return logit
        uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
        # A logistic variable has a standard deviation of pi / sqrt(3).
        scale = self.noise * self.budget.spread * math.sqrt(3) / math.pi
        return logit + scale * torch.logit(uniform)


def _budget(config: RouterConfig) -> Budget:
    if config.capacity_low is None:
        learns = not config.freeze_routers
        return Budget(target=config.capacity, gain=config.penalty_weight, learns=learns)
    return AnyBudget(asked=config.capacity, low=config.capacity_low, gain=config.penalty_weight)
