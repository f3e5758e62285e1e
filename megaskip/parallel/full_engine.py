"""One optimizer step of every weight of a model, on one process or on replicas: the same numbers.

Makes small backbones. Knows no routers: the engine that trains those is in engine.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from megaskip.arch.task_loss import TaskLoss
from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.parallel.optimizer import make_adamw, reduce_gradients, set_learning_rate
from megaskip.parallel.results import GlobalBatch, PendingStep, StepResult
from megaskip.parallel.topology import Topology


class FullEngine:
    """Trains all weights of the model in `module`, which every rank holds. Every method is
    collective."""

    def __init__(self, module: TaskLoss, config: RunConfig, topology: Topology) -> None:
        self.module = module
        self._topology = topology
        self._max_grad_norm = config.optim.max_grad_norm
        named = module.model.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.optimizer = make_adamw(self.parameters, config.optim)

    def train_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> StepResult:
        """Take one optimizer step as `launch_step` does, and wait for its numbers."""
        return self.launch_step(batches, lr, progress).result()

    def launch_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> PendingStep:
        """Take one optimizer step over this rank's micro-batches `batches` at learning rate `lr`.

        `progress`, the share of the run that is done after it, changes nothing here. A GPU is not
        waited for.
        """
        # The loss is a mean over the global batch, so it does not depend on how that is split.
        whole = GlobalBatch.of(batches, 0)
        batches = [batch.to(self._topology.device) for batch in batches]
        self.optimizer.zero_grad(set_to_none=False)
        loss = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for batch in batches:
            task = self._loss(batch) / whole.supervised
            task.backward()
            loss += task.detach()
        sum_over_ranks(loss)
        grad_norm = reduce_gradients(
            self.parameters, world_size=self._topology.world_size, max_norm=self._max_grad_norm
        )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        return PendingStep(
            torch.stack([loss, grad_norm.to(loss)]), int(whole.tokens), _meaning(whole)
        )

    def optimizer_states(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Return the optimizer's state by parameter."""
        return {name: self.optimizer.state[p] for name, p in self.parameters.items()}

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[Batch | None], *, check: Callable[[], object] = lambda: None
    ) -> float:
        """Return the mean loss of the supervised tokens of this and all other ranks' `batches`,
        nats.

        Every rank passes as many; None stands where a rank has run out. `check` is called before
        each of them.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._topology.device)
        with _without_dropout(self.module.model):
            for batch in batches:
                check()
                if batch is not None:
                    loss = self._loss(batch.to(self._topology.device))
                    sums += torch.stack([loss, loss.new_full((), batch.counts.supervised)])
        sum_over_ranks(sums)
        total, supervised = sums.tolist()
        return float(total / max(supervised, 1.0))

    def _loss(self, batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = self.module(
            batch.input_ids,
            batch.attention_mask,
            batch.position_ids,
            batch.labels,
            predicting=batch.predicting,
            lengths=batch.lengths,
        )
        return loss


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Let a module, which trains or does not as a whole, be in evaluation mode in here."""
    trains = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(trains)


def _meaning(whole: GlobalBatch) -> Callable[[torch.Tensor], StepResult]:
    """Return what makes a result of (loss, norm of the gradient) [2] on the CPU."""

    def result(numbers: torch.Tensor) -> StepResult:
        loss_task, norm = numbers.tolist()
        return StepResult(
            loss_task=loss_task,
            grad_norm=norm,
            tokens=int(whole.tokens),
            supervised_fraction=whole.supervised / max(whole.tokens, 1.0),
        )

    return result
