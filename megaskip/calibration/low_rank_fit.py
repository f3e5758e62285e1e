"""Reduced-rank ridge regression on streamed rows, in memory O(D k). Pure linear algebra.

Two phases over one stream of (x, y). The first sketches where in x the prediction of y lies: S =
X'X is known by its products with random vectors (Nystroem) and its diagonal, X'Y likewise, and P =
S^-1 X'Y Psi spans nearly what a full ridge regression would use. The second solves the ridge
regression of y on z = x P exactly, and cuts it to rank r where that costs least (reduced-rank
regression: the top singular vectors of what is predicted).
Shapes: N tokens, D hidden, k width of the sketch, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OVERSAMPLED = 8
"""Width of the sketch as a multiple of the rank."""
_LEAST_WIDTH = 128
_NOISE = 1e-5
"""Share of a mean square below which a variance is the rounding of float32 products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankMap:
    """y is nearly x down' up' + bias."""

    down: Tensor
    """float32 [r, D]."""
    up: Tensor
    """float32 [D, r]."""
    bias: Tensor
    """float32 [D]."""
    explained: float
    """Share of the variance of y that the map predicts, on the rows it was fitted to."""


class LowRankFit:
    """Accumulates rows, then solves; `sum_over_ranks` adds a tensor up in place over replicas.

    A phase holds what it needs and no more: four tensors [D, k], then one and one of float64.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        *,
        ridge: float = 1e-3,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        width = min(max(_OVERSAMPLED * rank, _LEAST_WIDTH), hidden_size)
        generator = torch.Generator().manual_seed(seed)
        self._rank, self._ridge = rank, ridge
        self._probe = torch.randn(hidden_size, width, generator=generator).to(device)
        self._targets = torch.randn(hidden_size, width, generator=generator).to(device)
        self._spread, self._cross = torch.zeros_like(self._probe), torch.zeros_like(self._probe)
        """X'X probe and X'Y targets, both about 0."""
        self._diagonal = torch.zeros(hidden_size, device=device)
        self._features: Tensor | None = None

    @property
    def sums(self) -> dict[str, Tensor]:
        """Return what is added up in the present phase, to be changed in place."""
        if self._features is None:
            return {"spread": self._spread, "cross": self._cross, "diagonal": self._diagonal}
        return {"moments": self._moments, "outputs": self._outputs, "square": self._square}

    @property
    def features(self) -> Tensor | None:
        """Return the features of the second phase, float32 [D, k]; None in the first."""
        return self._features

    def skip_first_phase(self) -> None:
        """Begin the second phase with features and sums of zero, to be filled with stored ones."""
        self._enter_second_phase(torch.zeros_like(self._probe))

    def observe(self, inputs: Tensor, updates: Tensor) -> None:
        """Take in rows: what was read and what was returned, [N, D] each, of any dtype."""
        x, y = inputs.float(), updates.float()
        if self._features is None:
            self._spread += x.t() @ (x @ self._probe)
            self._cross += x.t() @ (y @ self._targets)
            self._diagonal += x.square().sum(0)
            return
        z = torch.cat([x @ self._features, torch.ones_like(x[:, :1])], dim=1)
        self._moments += (z.t() @ z).double()
        self._outputs += (z.t() @ y).double()
        self._square += y.square().sum(dtype=torch.float64)

    def begin_second_phase(self, sum_over_ranks: Callable[[Tensor], object]) -> None:
        """Choose the features from the rows so far; later rows are regressed on them. Collective
        where `sum_over_ranks` is."""
        for total in (self._spread, self._cross, self._diagonal):
            sum_over_ranks(total)
        self._enter_second_phase(
            torch.linalg.qr(self._solve_sketched(self._cross.double())).Q.float()
        )

    def _enter_second_phase(self, features: Tensor) -> None:
        del self._probe, self._targets, self._spread, self._cross, self._diagonal
        hidden_size, width = features.shape
        in_double: dict[str, Any] = {"dtype": torch.float64, "device": features.device}
        self._features = features
        self._moments = torch.zeros(width + 1, width + 1, **in_double)
        self._outputs = torch.zeros(width + 1, hidden_size, **in_double)
        self._square = torch.zeros((), **in_double)

    def solve(self, sum_over_ranks: Callable[[Tensor], object]) -> LowRankMap:
        """Return the map of all rows of the second phase. Collective where `sum_over_ranks` is."""
        assert self._features is not None, "begin_second_phase() comes before solve()"
        for total in (self._moments, self._outputs, self._square):
            sum_over_ranks(total)
        count = self._moments[-1, -1].clamp(min=1)
        mean_z, mean_y = self._moments[-1, :-1] / count, self._outputs[-1] / count
        covariance = self._moments[:-1, :-1] / count - mean_z[:, None] * mean_z
        cross = self._outputs[:-1] / count - mean_z[:, None] * mean_y
        square = self._square / count
        variance = square - mean_y.square().sum()
        values, vectors = torch.linalg.eigh(covariance)
        ridge = self._ridge * values.mean().clamp(min=1e-30)
        whiten = vectors * (values.clamp(min=0) + ridge).rsqrt()
        # What is predicted, in coordinates in which z is white: its singular vectors are the cut.
        left, strength, right = torch.linalg.svd(whiten.t() @ cross, full_matrices=False)
        kept = strength.clone()
        kept[self._rank :] = 0
        # Of inputs that are all alike only the rounding of the sums is left: the mean is the map.
        kept *= values.sum() > _NOISE * self._moments[:-1, :-1].trace() / count
        features, scale = self._features.double(), kept.sqrt()
        down = _rows((features @ (whiten @ left) * scale).t(), self._rank)
        up = _rows((right.t() * scale).t(), self._rank).t()
        return LowRankMap(
            down=down.float(),
            up=up.float(),
            bias=(mean_y - up @ (down @ (features @ mean_z))).float(),
            explained=float(kept.square().sum() / torch.maximum(variance, _NOISE * square + 1e-30)),
        )

    def _solve_sketched(self, right: Tensor) -> Tensor:
        """Return S^-1 `right` float64 [D, k] for S = X'X, known as a sketch and a diagonal."""
        probe, diagonal = self._probe.double(), self._diagonal.double()
        mean = diagonal.mean().clamp(min=1e-30)
        spread = self._spread.double() + 1e-6 * mean * probe
        core = probe.t() @ spread
        values, vectors = torch.linalg.eigh((core + core.t()) / 2)
        kept = values > 1e-9 * values[-1]
        factor = spread @ (vectors[:, kept] * values[kept].rsqrt())  # S is nearly factor factor'
        rest = (diagonal - factor.square().sum(1)).clamp(min=0) + self._ridge * mean
        scaled = factor / rest[:, None]
        inner = factor.t() @ scaled
        inner.diagonal().add_(1)  # Woodbury
        solved = torch.linalg.solve(inner, scaled.t() @ right)
        solution: Tensor = right / rest[:, None] - scaled @ solved
        return solution


def _rows(matrix: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of a matrix, with rows of zeros where it has fewer."""
    missing = max(count - len(matrix), 0)
    return nn.functional.pad(matrix[:count], (0, 0, 0, missing))
