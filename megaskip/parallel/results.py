"""What a step and an evaluation measured: sums that add up over micro-batches and ranks, and the
numbers that follow from them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from megaskip.data import Batch
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.routing import Counts
from megaskip.routing.copies import CopyToHost


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks."""

    loss_task: float
    """Mean cross-entropy of the supervised tokens, nats."""
    loss_penalty: float = 0.0
    capacity: float = 1.0
    """Share of units that ran, over all routed layers; 1 without routers."""
    capacity_per_layer: tuple[float, ...] = ()
    grad_norm: float
    tokens: int
    """Real tokens of the global batch."""
    supervised_fraction: float
    """Share of the real tokens that have a loss."""


class PendingStep:
    """What a step measured, on its way to the host: a GPU may still be computing it."""

    def __init__(self, numbers: Tensor, tokens: int, meaning: Callable[[Tensor], StepResult]):
        """`meaning` makes the result of `numbers` [N] on the CPU; `tokens` as in StepResult."""
        self._numbers = CopyToHost(numbers)
        self._meaning = meaning
        self._result: StepResult | None = None
        self.tokens = tokens

    @property
    def has_arrived(self) -> bool:
        """Whether `result` would not wait for the device."""
        return self._numbers.has_arrived

    def result(self) -> StepResult:
        """Return the result; waits until the device has taken the step."""
        if self._result is None:
            self._result = self._meaning(self._numbers.read())
        return self._result


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Held-out numbers over all ranks."""

    loss: float
    """Mean cross-entropy of the supervised tokens, nats."""
    capacity: float
    capacity_error: float
    """Standard error of the capacity over rows."""
    capacity_per_layer: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """What all micro-batches of all replicas hold together."""

    supervised: float
    """Tokens with a loss, at least 1."""
    units: float
    """Decisions of all routed layers, at least 1."""
    tokens: float
    """Real tokens."""

    @classmethod
    def unit(cls) -> "GlobalBatch":
        """Return the batch for which losses are sums and no means."""
        return cls(supervised=1.0, units=1.0, tokens=1.0)

    @classmethod
    def of(cls, batches: Sequence[Batch], units: int) -> "GlobalBatch":
        """Return what the ranks' `batches`, with `units` decisions on this rank, are together.
        Collective, between hosts: no device is waited for."""
        supervised = sum(batch.counts.supervised for batch in batches)
        tokens = sum(batch.counts.tokens for batch in batches)
        sums = torch.tensor([supervised, units, tokens], dtype=torch.float64)
        sum_over_ranks(sums)
        supervised, all_units, tokens = sums.tolist()
        return cls(supervised=max(supervised, 1.0), units=max(all_units, 1.0), tokens=tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """What adds up over micro-batches and ranks: the scalar tensors of a subclass, and counts."""

    counts: Counts
    """By routed layer."""

    @classmethod
    def zeros(cls, layers: int, *, device: torch.device | None = None) -> Self:
        """Return sums of nothing, for `layers` routed layers."""
        size = len(cls._scalars()) + Counts.size(layers)
        return cls.unpack(torch.zeros(size, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, packed: Tensor) -> Self:
        """Return the sums that `pack` made into one tensor; they share its memory."""
        names = cls._scalars()
        scalars, counts = packed[: len(names)], packed[len(names) :]
        return cls(counts=Counts.unpack(counts), **dict(zip(names, scalars, strict=True)))

    def pack(self) -> Tensor:
        """Return one tensor float64 [N], so that one all-reduce sums everything."""
        scalars = [getattr(self, name).double() for name in self._scalars()]
        return torch.cat([torch.stack(scalars), self.counts.pack()])

    def __add__(self, other: Self) -> Self:
        """Return the sums of both."""
        return self.unpack(self.pack() + other.pack())

    def over_ranks(self) -> Self:
        """Return the sums of all ranks. Collective."""
        packed = self.pack()
        sum_over_ranks(packed)
        return self.unpack(packed)

    def on_host(self) -> Self:
        """Return these sums on the CPU: one wait for all of them."""
        return self.unpack(self.pack().cpu())

    @classmethod
    def _scalars(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums(_Sums):
    """What the micro-batches of a step add up to."""

    loss_task: Tensor
    """[], this part of the mean over the global batch, nats."""
    loss_penalty: Tensor
    """[], this part of the global batch's penalty."""

    def pending(self, batch: GlobalBatch, grad_norm: Tensor) -> PendingStep:
        """Return the result of a step from the sums of all ranks and the gradient's norm []; no
        device is waited for. `batch` is what they read."""

        def meaning(numbers: Tensor) -> StepResult:
            sums = self.unpack(numbers[:-1])
            return StepResult(
                loss_task=float(sums.loss_task),
                loss_penalty=float(sums.loss_penalty),
                capacity=sums.counts.capacity(),
                capacity_per_layer=sums.counts.capacity_per_layer(),
                grad_norm=float(numbers[-1]),
                tokens=int(batch.tokens),
                supervised_fraction=batch.supervised / max(batch.tokens, 1.0),
            )

        packed = self.pack()
        numbers = torch.cat([packed, grad_norm.detach().to(packed).reshape(1)])
        return PendingStep(numbers, int(batch.tokens), meaning)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSums(_Sums):
    """What the batches of a held-out pass add up to."""

    loss: Tensor
    """[], summed over the supervised tokens, nats."""
    supervised: Tensor
    """[], tokens with a loss."""
    rows: Tensor
    """[]."""
    shares: Tensor
    """[], each row's share of units that ran, summed over rows."""
    squared_shares: Tensor
    """[], their squares, summed over rows."""

    def result(self) -> EvalResult:
        """Return the result of a held-out pass from the sums of all ranks."""
        rows, shares, squares = map(float, (self.rows, self.shares, self.squared_shares))
        rows = max(rows, 1.0)
        variance = max(squares / rows - (shares / rows) ** 2, 0.0)
        return EvalResult(
            loss=float(self.loss) / max(float(self.supervised), 1.0),
            capacity=self.counts.capacity(),
            capacity_error=math.sqrt(variance / rows),
            capacity_per_layer=self.counts.capacity_per_layer(),
        )
