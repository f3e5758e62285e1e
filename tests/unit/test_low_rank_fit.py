"""Reduced-rank ridge regression on streamed rows: recovers what is there, in little memory."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaskip.calibration.low_rank_fit import LowRankFit, LowRankMap

HIDDEN = 96


def alone(total: Tensor) -> None:
    """Sum over one rank."""


def rows(count: int, *, rank: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (x, y) with y an affine map of x of the rank, and x as uneven as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    scales = torch.logspace(1, -2, HIDDEN)
    x = torch.randn(count, HIDDEN, generator=generator) * scales + 0.3
    down = torch.randn(rank, HIDDEN, generator=fixed) / scales
    up = torch.randn(HIDDEN, rank, generator=fixed)
    y = x @ down.t() @ up.t() / HIDDEN + torch.linspace(-1, 1, HIDDEN)
    return x, y + noise * torch.randn(count, HIDDEN, generator=generator)


def fitted(x: Tensor, y: Tensor, rank: int, **settings: float) -> LowRankMap:
    fit = LowRankFit(HIDDEN, rank, **settings)  # type: ignore[arg-type]
    first = len(x) // 4
    fit.observe(x[:first], y[:first])
    fit.begin_second_phase(alone)
    fit.observe(x[first:], y[first:])
    return fit.solve(alone)


def predicted(found: LowRankMap, x: Tensor) -> Tensor:
    return x @ found.down.t() @ found.up.t() + found.bias


def unexplained(found: LowRankMap, x: Tensor, y: Tensor) -> float:
    return float((y - predicted(found, x)).square().sum() / (y - y.mean(0)).square().sum())


def test_an_affine_map_of_the_rank_is_recovered() -> None:
    found = fitted(*rows(4000, rank=6), rank=6, ridge=1e-7)
    assert unexplained(found, *rows(500, rank=6, seed=1)) < 1e-3
    assert found.explained == pytest.approx(1, abs=1e-3)
    assert (found.down.shape, found.up.shape) == ((6, HIDDEN), (HIDDEN, 6))


def test_a_lower_rank_keeps_what_predicts_most() -> None:
    """Beside the exact reduced-rank regression of all rows."""
    x, y = rows(4000, rank=12, noise=0.5)
    found = fitted(x, y, rank=4, ridge=1e-7)
    centred_x, centred_y = (t.double() - t.double().mean(0) for t in (x, y))
    whole = torch.linalg.lstsq(centred_x, centred_y).solution
    right = torch.linalg.svd(centred_x @ whole, full_matrices=False).Vh[:4]
    held_x, held_y = rows(1000, rank=12, noise=0.5, seed=1)
    best = (held_x.double() - x.double().mean(0)) @ whole @ right.t() @ right
    error = held_y.double() - y.double().mean(0) - best
    exact = float(error.square().sum() / (held_y - held_y.mean(0)).square().sum())
    assert unexplained(found, held_x, held_y) < exact + 0.03
    assert exact < 0.9  # there is something to predict


def test_replicas_find_what_one_process_finds() -> None:
    x, y = rows(2000, rank=6, noise=0.2)
    whole = fitted(x, y, rank=4)
    fits = [LowRankFit(HIDDEN, 4) for _ in range(2)]
    for rank, fit in enumerate(fits):
        fit.observe(x[:500][rank::2], y[:500][rank::2])
    names = ("_spread", "_cross", "_diagonal")
    totals = [iter([sum(getattr(fit, name) for fit in fits) for name in names]) for _ in fits]
    for fit, sums in zip(fits, totals, strict=True):
        fit.begin_second_phase(lambda total, sums=sums: total.copy_(next(sums)))
        fit.observe(x[500:][fits.index(fit) :: 2], y[500:][fits.index(fit) :: 2])
    names = ("_moments", "_outputs", "_square")
    sums = iter([sum(getattr(fit, name) for fit in fits) for name in names])
    found = fits[0].solve(lambda total: total.copy_(next(sums)))
    assert torch.allclose(predicted(found, x), predicted(whole, x), atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in _tensors(output):
            self.largest = max(self.largest, tensor.numel())
        return output


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)


def test_memory_grows_with_the_rank_and_not_with_the_square_of_the_width() -> None:
    hidden = 4096
    with LargestTensor() as seen:
        fit = LowRankFit(hidden, 4)
        x = torch.randn(64, hidden)
        fit.observe(x, x)
        fit.begin_second_phase(alone)
        fit.observe(x, x)
        fit.solve(alone)
    assert seen.largest <= 150 * hidden


@pytest.mark.parametrize("value", [0.0, 3.7])
def test_rows_that_are_all_alike_give_the_mean(value: float) -> None:
    x, y = torch.full((64, HIDDEN), value), torch.full((64, HIDDEN), 3.7)
    found = fitted(x, y, rank=4)
    assert torch.allclose(predicted(found, x), y, rtol=1e-4)
    other = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    for map_ in (found, fitted(x, other, rank=4), fitted(other, y, rank=4)):
        assert max(map_.down.abs().max(), map_.up.abs().max(), map_.bias.abs().max()) < 10
        assert abs(map_.explained) < 1.01
