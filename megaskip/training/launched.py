"""Steps that a GPU may still be computing, and the numbers that come of them in their order. Knows
no model, and no file."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megaskip.errors import MegaskipError
from megaskip.parallel.results import PendingStep, StepResult
from megaskip.training.reporter import RunReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    step: int
    lr: float
    pending: PendingStep


class LaunchedSteps:
    """The launched steps of a run whose numbers are not recorded yet."""

    def __init__(self, reporter: RunReporter) -> None:
        self._reporter = reporter
        self._steps: deque[_Step] = deque()
        self._recorded_at = 0.0
        """When the numbers of the last recorded step were there, or its successor was launched."""

    def begin(self) -> None:
        """Measure the time of the coming step from now, unless another one is on its way."""
        if not self._steps:
            self._recorded_at = time.perf_counter()

    def add(self, step: int, lr: float, pending: PendingStep) -> None:
        """Take note of a step that was launched at learning rate `lr`."""
        self._steps.append(_Step(step=step, lr=lr, pending=pending))

    def record_what_arrived(self) -> None:
        """Record the numbers that can be read without a wait for the device, up to a gradient that
        is not finite: ranks must not end at different steps."""
        results = []
        for launched in self._steps:
            if not launched.pending.has_arrived or not _is_finite(launched.pending.result()):
                break
            results.append(launched.pending.result())
        self._record(results, {})

    def record_all(self, scores: Mapping[int, Tensor] | None = None) -> None:
        """Record every step so far, with the router `scores` of the last one. All ranks call it at
        the same step; raises MegaskipError on all of them for a gradient that is not finite."""
        results = [launched.pending.result() for launched in self._steps]
        for launched, result in zip(self._steps, results, strict=True):
            if not _is_finite(result):
                raise MegaskipError(
                    f"step {launched.step}: the gradient is {result.grad_norm} (loss "
                    f"{result.loss_task:.4g}); a smaller --lr, float32, or other data. Checkpoints "
                    "so far are untouched"
                )
        self._record(results, scores or {})

    def _record(self, results: Sequence[StepResult], scores: Mapping[int, Tensor]) -> None:
        """Record the oldest launched steps, whose `results` are there; `scores` are of the last."""
        now = time.perf_counter()
        if results:
            seconds, self._recorded_at = (now - self._recorded_at) / len(results), now
        for number, result in enumerate(results, start=1):
            launched = self._steps.popleft()
            self._reporter.record(
                launched.step,
                result,
                lr=launched.lr,
                seconds=seconds,
                scores=scores if number == len(results) else {},
            )


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.grad_norm)  # the same on every rank
