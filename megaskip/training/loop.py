"""The loop of a run. Owns the order of events, not the arithmetic of a step, nor any file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.data.loader import DataLoader
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.preempt import Preemption
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import peak_memory_gib
from megaskip.routing.compensation import is_compensation
from megaskip.training.checkpointer import Checkpointer
from megaskip.training.early_stop import EarlyStop
from megaskip.training.launched import LaunchedSteps
from megaskip.training.reporter import RunEnd, RunReporter
from megaskip.training.schedule import learning_rate

logger = get_logger(__name__)


class AskedToStop(Exception):  # noqa: N818  not an error
    """A signal came; every rank raises it at the same point of the run."""


class OneAhead:
    """The micro-batches of each step, on the device, of which the next one's can be prepared
    early."""

    def __init__(self, steps: Iterator[list[Batch]], device: torch.device) -> None:
        self._steps, self._device = steps, device
        self._prepared: list[Batch] | None = None

    def prepare(self) -> None:
        """Collate the next step's micro-batches and send them to the device, unless that is
        done; a GPU is not waited for."""
        if self._prepared is None:
            self._prepared = [batch.to(self._device) for batch in next(self._steps)]

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
    early_stop: EarlyStop = field(init=False)
    """The evaluations so far."""
    _preemption: Preemption = field(default_factory=Preemption)
    _launched: LaunchedSteps = field(init=False)

    def __post_init__(self) -> None:
        self._launched = LaunchedSteps(self.reporter)
        self.early_stop = self._early_stop(())

    # -- what depends on what trains

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Return the held-out numbers; none when nothing is held out. Collective."""

    def prepare(self) -> None:  # noqa: B027  optional
        """Compute what a run, new or resumed, computes once before it goes on. Collective."""

    def start(self) -> None:  # noqa: B027  optional
        """Set what is computed rather than learnt, before the first step. Collective."""

    def calibrate(self) -> None:  # noqa: B027  optional
        """Set what is measured rather than learnt, after the last step. Collective."""

    def prepare_step(self) -> None:  # noqa: B027  optional
        """Set what learns in the coming step. Every rank calls it."""

    def scores(self) -> dict[int, Tensor]:
        """Return router scores of the last micro-batch by layer, for histograms. Collective."""
        return {}

    # -- the run

    def run(self) -> dict[str, Any]:
        """Train, evaluate and write; return the content of report.json (on all ranks). Collective.

        A run that is asked to stop (SIGTERM) saves at the next step border and returns {}.
        """
        on_first_rank(self.topology, lambda: self.reporter.start_trackers(self.step))
        with self.reporter.open(self.step), self._preemption:
            self._recall_evaluations()
            try:
                self.prepare()
                if self.step == 0:
                    self.start()
                self._take_steps()
                self._return_to_best()
                self.calibrate()
                self.save()
                return self._close()
            except AskedToStop:  # what is trained is saved wherever it is raised
                return self._stopped()

    def _take_steps(self) -> None:
        batches = OneAhead(self.loader.steps(self.step), self.topology.device)
        self._evaluate_if_due()  # a run that goes on may have ended before it could
        while self.step < self.total_steps and not self.early_stop.is_over:
            self._seed()
            self.prepare_step()
            self._step(batches)
            if self._preemption.requested():
                self.save()
                raise AskedToStop
            if self.step < self.total_steps:
                self._between_steps()
        self._launched.record_all()

    def _step(self, batches: "OneAhead") -> None:
        """Launch one step, prepare the next one's batches, and record what is known by then."""
        self._launched.begin()
        lr = learning_rate(self.config.optim, self.step, self.total_steps)
        done = (self.step + 1) / self.total_steps
        pending = self.engine.launch_step(batches.take(), lr, done)
        self.step, self.tokens = self.step + 1, self.tokens + pending.tokens
        self._launched.add(self.step, lr, pending)
        if self.step < self.total_steps:
            batches.prepare()
        if self._is_due(self.config.log.log_every):
            self._launched.record_all(self.scores())
        elif self.topology.is_first:  # the progress bar moves on
            self._launched.record_what_arrived()

    def _between_steps(self) -> None:
        if self._is_due(self.config.checkpoint.save_every):
            self.save()
        self._evaluate_if_due()

    def _evaluate_if_due(self) -> None:
        is_between = 0 < self.step < self.total_steps and not self.early_stop.knows(self.step)
        if is_between and self._is_due(self.config.log.eval_every):
            self._launched.record_all()
            try:
                self._evaluate_between()
            except AskedToStop:
                self.save()  # the run that goes on begins with this evaluation
                raise

    def _evaluate_between(self) -> None:
        """Measure, and keep what is the best so far where --early_stop asks for it. Collective."""
        numbers = self.evaluate()
        if not numbers:
            return
        numbers = on_first_rank(self.topology, lambda: numbers)  # ranks must stop alike
        if self.early_stop.add(self.step, numbers) and self.early_stop.patience:
            self.checkpointer.keep_best(self.step, self.tokens, self.early_stop.best_of)
        self.reporter.held_out(self.step, numbers)  # last: a killed run evaluates again

    def _early_stop(self, evaluations: Sequence[Mapping[str, Any]]) -> EarlyStop:
        capacity = self.config.router.capacity
        return EarlyStop(self.config.log.early_stop, capacity, evaluations)

    def _recall_evaluations(self) -> None:
        """Take up the evaluations of a run that goes on. Collective."""
        evaluations, kept = on_first_rank(
            self.topology, lambda: (self.reporter.evaluations(), self.checkpointer.best_steps())
        )
        self.early_stop = self._early_stop(evaluations)
        lost = self.early_stop.forget_lost(kept) if self.early_stop.patience else []
        if lost:
            logger.warning(
                "--early_stop: what was trained at step %s was not kept, so what was evaluated "
                "there does not count",
                ", ".join(map(str, lost)),
            )

    def _return_to_best(self) -> None:
        """Take up what was trained at the lowest held-out loss, with --early_stop. Collective."""
        if not self.early_stop.patience:
            return
        if not self.early_stop.knows(self.step):
            self.save()  # what is trained is safe while this takes its time
            self._evaluate_between()
        best = self.early_stop.best
        if best is None:
            logger.warning(
                "--early_stop: no evaluation ran as little as --capacity %g asks for; what was "
                "trained last is kept",
                self.config.router.capacity,
            )
        elif best.step != self.step:
            self.checkpointer.resume(self.checkpointer.best_path(best.step))
            logger.info("step %d has the lowest held-out loss, %.4f", best.step, best.loss)

    def _seed(self) -> None:
        """Make randomness a function of (seed, step, rank), so that none of it has to be saved; the
        same on ranks that share rows, because they decide alike about them."""
        seed = self.config.optim.seed * 1_000_003 + self.step
        rank = self.topology.rank - self.topology.sequence_rank
        torch.manual_seed((seed * 65_537 + rank) % 2**64)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # -- checkpoints

    def save(self) -> Path:
        """Write a checkpoint of this step. Collective."""
        self._launched.record_all()  # nothing is saved after a gradient that is not finite
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
                early_stop=self.early_stop.describe(self.step),
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
