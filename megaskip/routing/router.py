"""The routers themselves: what scores a unit. Torch only; they do not know what they decide about.

Shapes: B rows, U units of decision in a row, D hidden, S scores of a unit: 1, or one for each
expert of a layer.
"""

import math

import torch
from torch import Tensor, nn

from megaskip.config.routing import RoutingConfig
from megaskip.routing.compensation import BiasCompensation, make_compensation, random_normal
from megaskip.routing.experts import Experts

PREFIX = "skip_routers"
"""Where a model carries its routers, and what their tensors' names begin with."""
_MLP_WIDTH = 16


class Router(nn.Module):
    """A linear router, one score a unit (paper section 3): weight float32 [S, D], zero at the
    start."""

    def __init__(
        self, hidden_size: int, scores: int = 1, *, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.compensation: BiasCompensation | None = None
        """What a skipped unit gets; its tensors are named "compensation.*"."""
        weight = torch.zeros(scores, hidden_size, dtype=torch.float32, device=device)
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, U] of features float32 [B, U, D], on their device; [B, U, S]
        where a unit has more than one score."""
        weight = self.weight.to(device=features.device, dtype=torch.float32)
        return nn.functional.linear(features, weight).squeeze(-1)


class AffineRouter(Router):
    """A linear router with a bias, float32 [S], zero at the start."""

    def __init__(
        self, hidden_size: int, scores: int = 1, *, device: torch.device | None = None
    ) -> None:
        super().__init__(hidden_size, scores, device=device)
        self.bias = nn.Parameter(torch.zeros(scores, dtype=torch.float32, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32, shaped as Router's."""
        return super().forward(features) + self.bias.to(features.device, torch.float32)


class MlpRouter(Router):
    """A router with one hidden layer: `inner` float32 [16, D], and on top the weight, [S, 16]."""

    def __init__(
        self, hidden_size: int, scores: int = 1, *, device: torch.device | None = None
    ) -> None:
        super().__init__(_MLP_WIDTH, scores, device=device)
        # The same on every rank, whatever its random state is.
        generator = torch.Generator().manual_seed(0)
        inner = random_normal(_MLP_WIDTH, hidden_size, generator) / math.sqrt(hidden_size)
        self.inner = nn.Parameter(inner.to(device=device or torch.get_default_device()))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32, shaped as Router's."""
        inner = self.inner.to(features.device, torch.float32)
        return super().forward(nn.functional.silu(nn.functional.linear(features, inner)))


def make_router(
    config: RoutingConfig,
    hidden_size: int,
    *,
    experts: Experts | None = None,
    device: torch.device | None = None,
) -> Router:
    """Return a fresh router as `config` asks for, with its compensation, if any; `experts` are
    those of the layer, where they are what is skipped."""
    assert config.routes_experts == (experts is not None)
    kinds = {"linear": Router, "affine": AffineRouter, "mlp": MlpRouter}
    router = kinds[config.router](hidden_size, experts.count if experts else 1, device=device)
    kind, rank = config.compensation, config.compensation_rank
    router.compensation = make_compensation(kind, hidden_size, rank, device=device)
    return router
