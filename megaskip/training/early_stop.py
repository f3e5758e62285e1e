"""When a run ends before its last step: after held-out evaluations in a row that were not better.
Knows numbers, not models."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CAPACITY_TOLERANCE = 0.01
"""How far from the asked capacity a run may end without a warning, beside chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation in the middle of a run says about stopping."""

    step: int
    loss: float
    """Held-out loss of what trains."""
    counts: bool
    """Whether no more ran than was asked for: fresh routers run everything, and nothing that skips
    is as good as that."""


class EarlyStop:
    """The evaluations of a run so far; the same on every rank."""

    def __init__(
        self, patience: int, asked: float, numbers: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """`patience` is the number of evaluations without progress that ends a run, 0 for none;
        `asked` the capacity. `numbers` are those of evaluations before, with their `step`."""
        self.patience = patience
        self._asked = asked
        self._evaluations: list[Evaluation] = []
        for entry in numbers:
            self.add(int(entry["step"]), entry)

    def add(self, step: int, numbers: Mapping[str, Any]) -> bool:
        """Take note of the numbers of Trainer.evaluate after `step`; return whether they are the
        best so far."""
        limit = self._asked + CAPACITY_TOLERANCE + 2 * numbers.get("capacity_standard_error", 0.0)
        evaluation = Evaluation(
            step=step,
            loss=numbers.get("loss_routed", numbers.get("loss")),
            counts=numbers.get("capacity", 0.0) <= limit,
        )
        self._evaluations.append(evaluation)
        return self.best_of(step) == step

    def forget_lost(self, kept: Collection[int]) -> list[int]:
        """Let the best evaluations count no more to whose state the run cannot return, because
        their steps are not among those `kept`; return these steps."""
        lost = []
        while (best := self.best) is not None and best.step not in kept:
            lost.append(best.step)
            self._evaluations = [
                dataclasses.replace(e, counts=e.counts and e.step != best.step)
                for e in self._evaluations
            ]
        return lost

    def knows(self, step: int) -> bool:
        """Return whether there was an evaluation after `step`."""
        return any(evaluation.step == step for evaluation in self._evaluations)

    def best_of(self, step: int) -> int | None:
        """Return the step of the best evaluation up to `step`, the first of equal ones; None where
        none counts."""
        best = _best(e for e in self._evaluations if e.step <= step)
        return None if best is None else best.step

    @property
    def best(self) -> Evaluation | None:
        """Return the best evaluation; None where none counts."""
        return _best(self._evaluations)

    @property
    def is_over(self) -> bool:
        """Return whether the run ends here."""
        best = self.best
        if not self.patience or best is None:
            return False
        return sum(e.counts and e.step > best.step for e in self._evaluations) >= self.patience

    def describe(self, step: int) -> dict[str, Any] | None:
        """Return what a report says of a run that ended after `step`; None without patience."""
        if not self.patience:
            return None
        best = self.best
        return {
            "patience": self.patience,
            "stopped": self.is_over,
            "step": step,
            "best_step": None if best is None else best.step,
            "best_loss": None if best is None else best.loss,
        }


def _best(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """Return the best of those that count, the first of equal ones; a loss that is no number is
    the worst."""
    counting = [e for e in evaluations if e.counts]
    return min(counting, key=lambda e: (math.isnan(e.loss), e.loss), default=None)
