"""The loop of a run. Owns the order of events, not the arithmetic of a step, nor any file."""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.data.loader import DataLoader
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.preempt import Preemption
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.results import StepResult
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import peak_memory_gib
from megaskip.routing.compensation import is_compensation
from megaskip.training.checkpointer import Checkpointer
from megaskip.training.reporter import RunEnd, RunReporter
from megaskip.training.schedule import learning_rate

logger = get_logger(__name__)


class AskedToStop(Exception):  # noqa: N818  not an error
    """A signal came; every rank raises it at the same point of the run."""


class OneAhead:
    """The micro-batches of each step, of which the next one's can be prepared early."""

    def __init__(self, steps: Iterator[list[Batch]]) -> None:
        self._steps = steps
        self._prepared: list[Batch] | None = None

    def prepare(self) -> None:
        """Collate the next step's micro-batches, unless that is done."""
        if self._prepared is None:
            self._prepared = next(self._steps)

    def take(self) -> list[Batch]:
        """Return the next step's micro-batches."""
        self.prepare()
        batches, self._prepared = self._prepared, None
        assert batches is not None
        return batches


@dataclass(kw_only=True)
class Trainer(ABC):
    """One run. Every rank makes one and calls `run`. What trains is a subclass's business."""

    config: RunConfig
    topology: Topology
    engine: StepEngine
    loader: DataLoader
    checkpointer: Checkpointer
    reporter: RunReporter
    total_steps: int
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Real tokens seen."""
    calibrated: float | None = None
    """Capacity of the calibration rows, once calibrated."""
    _preemption: Preemption = field(default_factory=Preemption)

    # -- what depends on what trains

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Return the held-out numbers; none when nothing is held out. Collective."""

    def start(self) -> None:  # noqa: B027  optional
        """Set what is computed rather than learnt, before the first step. Collective."""

    def calibrate(self) -> None:  # noqa: B027  optional
        """Set what is measured rather than learnt, after the last step. Collective."""

    def scores(self) -> dict[int, Tensor]:
        """Return router scores of the last micro-batch by layer, for histograms. Collective."""
        return {}

    # -- the run

    def run(self) -> dict[str, Any]:
        """Train, evaluate and write; return the content of report.json (on all ranks). Collective.

        A run that is asked to stop (SIGTERM) saves at the next step border and returns {}.
        """
        with self.reporter.open(self.step), self._preemption:
            try:
                if self.step == 0:
                    self.start()
                self._take_steps()
                self.calibrate()
                self.save()
                return self._close()
            except AskedToStop:  # what is trained is saved wherever it is raised
                return self._stopped()

    def _take_steps(self) -> None:
        batches = OneAhead(self.loader.steps(self.step))
        while self.step < self.total_steps:
            self._seed()
            self._step(batches)
            if self._preemption.requested():
                self.save()
                raise AskedToStop
            if self.step < self.total_steps:
                self._between_steps()

    def _step(self, batches: "OneAhead") -> None:
        """Take one step and record it; the next one's batches are prepared while a GPU computes."""
        begun = time.perf_counter()
        lr = learning_rate(self.config.optim, self.step, self.total_steps)
        done = (self.step + 1) / self.total_steps
        meanwhile = batches.prepare if self.step + 1 < self.total_steps else lambda: None
        result = self.engine.train_step(batches.take(), lr, done, meanwhile)
        self._require_finite(result)
        seconds = time.perf_counter() - begun
        self.step, self.tokens = self.step + 1, self.tokens + result.tokens
        scores = self.scores() if self._is_due(self.config.log.log_every) else {}
        self.reporter.record(self.step, result, lr=lr, seconds=seconds, scores=scores)

    def _between_steps(self) -> None:
        if self._is_due(self.config.checkpoint.save_every):
            self.save()
        if self._is_due(self.config.log.eval_every):
            with contextlib.suppress(AskedToStop):  # the next step border saves and stops
                self.reporter.held_out(self.step, self.evaluate())

    def _require_finite(self, result: StepResult) -> None:
        if not math.isfinite(result.grad_norm):  # the same on every rank
            raise MegaskipError(
                f"step {self.step + 1}: the gradient is {result.grad_norm} (loss "
                f"{result.loss_task:.4g}); a smaller --lr, float32, or other data. Checkpoints so "
                "far are untouched"
            )

    def _seed(self) -> None:
        """Make randomness a function of (seed, step, rank), so that none of it has to be saved."""
        seed = self.config.optim.seed * 1_000_003 + self.step
        torch.manual_seed(seed * 65_537 + self.topology.rank)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # -- checkpoints

    def save(self) -> Path:
        """Write a checkpoint of this step. Collective."""
        return self.checkpointer.save(self.step, self.tokens)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint; raises CheckpointError when it does not fit this run. Every
        rank calls it."""
        state = self.checkpointer.resume(path)
        self.step, self.tokens = state.step, state.tokens
        logger.info("resumed from %s: step %d of %d", path, self.step, self.total_steps)

    # -- the end

    def stop_if_asked(self) -> None:
        """Raise AskedToStop on all ranks when any rank was asked to stop. Collective."""
        if self._preemption.requested():
            raise AskedToStop

    def _stopped(self) -> dict[str, Any]:
        logger.info(
            "asked to stop: saved %s, step %d of %d; --resume auto continues",
            self.checkpointer.path(self.step),
            self.step,
            self.total_steps,
        )
        return {}

    def _close(self) -> dict[str, Any]:
        """Measure what remains to be measured and report. Collective."""
        held_out = self.evaluate()
        peak = torch.tensor(peak_memory_gib(self.topology.device), device=self.topology.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)

        def report() -> dict[str, Any]:
            sizes = bytes_by_kind(self.engine)
            end = RunEnd(
                step=self.step,
                tokens=self.tokens,
                held_out=held_out,
                calibrated=self.calibrated,
                trained_bytes=sizes["trained"] + sizes["moments"],
                trained_parameters=sum(p.numel() for p in self.engine.parameters.values()),
                compensation_parameters=sum(
                    p.numel() for n, p in self.engine.parameters.items() if is_compensation(n)
                ),
                peak_memory_gib=float(peak),
                written=self.checkpointer.weights.save_result(self.checkpointer.output_dir),
            )
            return self.reporter.close(end)

        return on_first_rank(self.topology, report)
