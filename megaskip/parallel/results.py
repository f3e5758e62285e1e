"""What a step and an evaluation measured, over all ranks: from sums that add up to numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, over all ranks."""

    loss_task: float
    """Mean cross-entropy of the supervised tokens, nats."""
    loss_penalty: float
    capacity: float
    """Units kept over all routed layers; 1 without routers."""
    capacity_per_layer: tuple[float, ...]
    grad_norm: float
    tokens: int
    """Real tokens of the global batch."""
    supervised_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Held-out numbers over all ranks."""

    loss: float
    """Mean cross-entropy of the supervised tokens, nats."""
    capacity: float
    capacity_error: float
    """Standard error of the capacity: these are only so many rows."""
    capacity_per_layer: tuple[float, ...]

    @classmethod
    def of(cls, sums: Sequence[float]) -> "EvalResult":
        """Return the result of summed Engine._eval_sums."""
        kept, units, *_ = quarters(sums[5:])
        rows = max(sums[2], 1.0)
        variance = max(sums[4] / rows - (sums[3] / rows) ** 2, 0.0)
        return cls(
            loss=sums[0] / max(sums[1], 1.0),
            capacity=share_of(sum(kept), sum(units)) if kept else 1.0,
            capacity_error=math.sqrt(variance / rows),
            capacity_per_layer=tuple(map(share_of, kept, units)),
        )


def quarters(values: Sequence[float]) -> list[Sequence[float]]:
    """Return the rows of packed Counts."""
    layers = len(values) // 4
    return [values[i * layers : (i + 1) * layers] for i in range(4)]


def share_of(kept: float, units: float) -> float:
    """Return the capacity; 0 where nothing was seen."""
    return kept / max(units, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the global batch holds, over all micro-batches and ranks."""

    supervised: float
    units: float
    tokens: float
