"""Ridge regression of one number on streamed rows, its strength chosen by cross-validation. Pure
linear algebra.

All that is kept of the rows is the sums of products of v = [z, 1, y], for two halves of them: what
is fitted to one half is judged on the other. z is the row itself, or for wide rows its share in the
directions in which the first rows vary most, so that memory is O(D k).
Shapes: N rows, D hidden, k features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaskip.errors import ConfigError

_MOST_FEATURES = 1024
"""Wider rows are reduced to so many features."""
_NOISE = 1e-5
"""Share of a mean square below which a variance is the rounding of float32 products."""
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridges that are tried; features have a variance of 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """y is nearly x weight + bias."""

    weight: Tensor
    """float64 [D]."""
    bias: float
    mean: float
    """Mean of y over the rows."""
    spread: float
    """Standard deviation of what is predicted."""
    explained: float
    """Share of the variance of y in one half of the rows that the other half predicts."""


class CostRegression:
    """Accumulates rows, then solves; `sum_over_ranks` adds a tensor up in place over replicas."""

    def __init__(
        self, hidden_size: int, *, seed: int = 0, device: torch.device | None = None
    ) -> None:
        self._hidden_size, self._device = hidden_size, device
        self._features: Tensor | None = None
        self._probe = self._products = torch.zeros(0, device=device)
        if self.needs_features:
            generator = torch.Generator().manual_seed(seed)
            self._probe = torch.randn(hidden_size, _MOST_FEATURES, generator=generator).to(device)
            self._products = torch.zeros_like(self._probe)
        size = min(hidden_size, _MOST_FEATURES) + 2
        self._moments = torch.zeros(2, size, size, dtype=torch.float64, device=device)

    @property
    def needs_features(self) -> bool:
        """Return whether rows are so wide that `sketch` and `choose_features` come first."""
        return self._hidden_size > _MOST_FEATURES

    @property
    def sums(self) -> dict[str, Tensor]:
        """Return what is added up behind the choice of features, to be changed in place."""
        return {"moments": self._moments}

    @property
    def features(self) -> Tensor | None:
        """Return the chosen features, float32 [D, k]; None before, or where rows are narrow."""
        return self._features

    def skip_choice(self) -> None:
        """Have features of zero where there are to be some, to be filled with stored ones."""
        if self.needs_features:
            self._features = torch.zeros_like(self._probe)
            del self._probe, self._products

    def sketch(self, inputs: Tensor) -> None:
        """Take in rows [N, D] from which the features are chosen."""
        x = inputs.float()
        self._products += x.t() @ (x @ self._probe)

    def choose_features(self, sum_over_ranks: Callable[[Tensor], object]) -> None:
        """Choose the features from the rows so far. Collective where `sum_over_ranks` is."""
        sum_over_ranks(self._products)
        self._features = torch.linalg.qr(self._products).Q
        del self._probe, self._products

    def observe(self, inputs: Tensor, costs: Tensor, *, half: int) -> None:
        """Take in rows [N, D] and their numbers [N] as one of the halves 0 and 1."""
        x = inputs.float()
        z = x if self._features is None else x @ self._features
        rows = torch.cat([z, torch.ones_like(z[:, :1]), costs.float()[:, None]], dim=1)
        self._moments[half] += (rows.t() @ rows).double()

    def solve(self, sum_over_ranks: Callable[[Tensor], object]) -> LinearCost:
        """Return the regression of all rows. Collective where `sum_over_ranks` is.

        Raises ConfigError, on every rank, where one half has no rows.
        """
        sum_over_ranks(self._moments)
        halves = self._moments.cpu()
        if not halves[:, -2, -2].all():
            raise ConfigError(
                "all text that routers are fitted on is in one half, and the other half judges "
                "what is fitted to it; give more --data or --cost_rows, or start fewer ranks"
            )
        lost = _squared_errors(_fits(halves[0]), halves[1])
        lost += _squared_errors(_fits(halves[1]), halves[0])
        best, whole = int(lost.argmin()), halves.sum(0)
        solution = _fits(whole)[best]
        count = whole[-2, -2].clamp(min=1)
        mean = whole[-1, -2] / count
        square = whole[-1, -1] / count
        variance = torch.maximum(square - mean.square(), _NOISE * square + 1e-30)
        weight, bias = solution[:-2], float(solution[-2])
        center = whole[:-2, -2] / count
        predicted = weight @ (whole[:-2, :-2] / count) @ weight - (weight @ center).square()
        features = self._features
        return LinearCost(
            weight=weight if features is None else features.cpu().double() @ weight,
            bias=bias,
            mean=float(mean),
            spread=float(predicted.clamp(min=0).sqrt()),
            explained=float(1 - lost[best].clamp(min=0) / (count * variance)),
        )


def _fits(moments: Tensor) -> Tensor:
    """Return [w, c, -1] for each strength, float64 [S, k + 2]: y is nearly z w + c."""
    count = moments[-2, -2].clamp(min=1)
    center, mean = moments[:-2, -2] / count, moments[-1, -2] / count
    covariance = moments[:-2, :-2] / count - center[:, None] * center
    cross = moments[:-2, -1] / count - center * mean
    variances, squares = covariance.diagonal(), moments[:-2, :-2].diagonal() / count
    # A feature that hardly varies is the rounding of its sums: it predicts nothing.
    varies = variances > _NOISE * squares + 1e-30
    deviation = torch.where(varies, variances, torch.inf).sqrt()
    values, vectors = torch.linalg.eigh(covariance / deviation[:, None] / deviation)
    strengths = torch.tensor(_STRENGTHS, dtype=torch.float64)
    rotated = vectors.t() @ (cross / deviation)
    weights = (rotated / (values.clamp(min=0) + strengths[:, None])) @ vectors.t() / deviation
    biases = mean - weights @ center
    return torch.cat([weights, biases[:, None], -torch.ones_like(biases[:, None])], dim=1)


def _squared_errors(fits: Tensor, moments: Tensor) -> Tensor:
    """Return the summed squared error of `fits` [S, k + 2] on rows of these moments, float64
    [S]."""
    return ((fits @ moments) * fits).sum(1)
