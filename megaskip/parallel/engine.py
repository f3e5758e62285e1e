"""One optimizer step over a global batch, on one process, on replicas, or under ZeRO-3: the same
numbers.

Task loss and penalty are divided by the supervised tokens and routed units of the whole global
batch, so that what micro-batches and ranks add up to does not depend on how the batch was split.
"""

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.parallel.forward_engine import ForwardEngine
from megaskip.parallel.optimizer import (
    clear_gradients,
    make_adamw,
    reduce_gradients,
    set_learning_rate,
)
from megaskip.parallel.results import GlobalBatch, PendingStep, StepResult, StepSums
from megaskip.parallel.sequence import SequenceGroup
from megaskip.parallel.shared_moments import SharedMoments
from megaskip.parallel.topology import Topology
from megaskip.routing import Measured, RouterSet


class Engine(ForwardEngine):
    """Trains the routers of the model in `module`, and evaluates. Every method is collective.

    `zero3` is the handle of ZeRO-3's hooks, where the model is sharded; `group` as in
    ForwardEngine.
    """

    def __init__(
        self,
        module: nn.Module,
        routers: RouterSet,
        config: RunConfig,
        topology: Topology,
        zero3: Any = None,
        group: SequenceGroup | None = None,
    ) -> None:
        super().__init__(module, routers, topology, group)
        self._zero3 = zero3
        self._max_grad_norm = config.optim.max_grad_norm
        self._distill, self._noise = config.optim.distill, config.optim.noise
        self._has_penalty = True
        routers.steering.temperature = config.optim.temperature
        self.parameters = routers.trained_parameters()
        self._moments = SharedMoments(self.parameters, topology)
        self.optimizer = make_adamw(self._moments.mine(), config.optim, config.adapter)

    def train_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> StepResult:
        """Take one optimizer step as `launch_step` does, and wait for its numbers."""
        return self.launch_step(batches, lr, progress).result()

    def launch_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> PendingStep:
        """Take one optimizer step over this rank's micro-batches `batches` at learning rate `lr`.

        `progress` is the share of the run that is done after it (see RouterSet.steer). A GPU is not
        waited for: what a step measures moves the thresholds there, too.
        """
        whole = self._global_batch(batches)
        batches = [batch.to(self._topology.device) for batch in batches]
        clear_gradients(self.parameters)
        with self._noisy():
            sums = self._micro_steps(batches, whole)
        learning = {name: p for name, p in self.parameters.items() if p.requires_grad}
        grad_norm = reduce_gradients(
            learning, world_size=self.world_size, max_norm=self._max_grad_norm
        )
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self._moments.spread()
        sums = sums.over_ranks()
        self.routers.steer(Measured.of(sums.counts), progress=progress)
        return sums.pending(whole, grad_norm)

    def optimizer_states(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the optimizer's state by parameter, of all of them on the first rank.
        Collective."""
        return self._moments.states(self.optimizer)

    def gate_gradients(
        self,
        batch: Batch | None,
        groups: Sequence[Sequence[int]],
        *,
        at: Tensor,
        distill: float,
    ) -> Generator[tuple[Tensor, dict[int, Tensor]], None, None]:
        """Yield, for each of `groups` of layers, (the real units, bool [B, U]; the gradients of the
        summed loss of `batch` with respect to the gates of these layers, float32 [B, U] by layer,
        of those on this rank): with these gates at `at`, float32 [B, 1] between 0, skipped, and 1,
        and every other layer running.

        `distill` is the share of each label that is the dense model's prediction. For None a
        placeholder runs. Collective.
        """
        ran = self._on_device(batch)
        real = self._pooling(ran).unit_mask
        before, self._distill, self._has_penalty = self._distill, distill, False
        try:
            teachers = self._teacher_states([ran])
            for layers in groups:
                start = at[: len(real)].to(real.device).expand(real.shape)
                gates = {layer: start.clone().requires_grad_() for layer in layers}
                with self.routers.disabled(), self.routers.override(gates):
                    self._micro_steps([ran], GlobalBatch.unit(), teachers)
                own = [layer for layer in layers if layer in self.own_layers]
                yield real, {layer: _gradient(gates[layer]) for layer in own}
        finally:
            self._distill, self._has_penalty = before, True
            clear_gradients(self.parameters)

    # -- what a pipeline does in its own way

    def _micro_steps(
        self,
        batches: Sequence[Batch],
        whole: GlobalBatch,
        teachers: Sequence[Tensor | None] | None = None,
    ) -> StepSums:
        """Add the gradients of all micro-batches to the parameters'; return what they add up to.
        `teachers` are their `_teacher_states`, if known."""
        sums = StepSums.zeros(self._num_routed, device=self._topology.device)
        for n, batch in enumerate(batches):
            (teacher,) = self._teacher_states([batch]) if teachers is None else [teachers[n]]
            sums += self._micro_step(batch, whole, len(batches), teacher)
        return sums

    def _teacher_states(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """Return what the frozen model's last hidden states [N, D] are at the supervised tokens of
        each micro-batch, unrouted and without adapters; None without --distill."""
        if not self._distill:
            return [None] * len(batches)
        with self.routers.disabled(), self._without_adapters(), torch.no_grad():
            return [self._forward(batch, states_only=True) for batch in batches]

    # -- micro-batches

    def _micro_step(
        self, batch: Batch, whole: GlobalBatch, micro_batches: int, teacher: Tensor | None
    ) -> StepSums:
        """Add one micro-batch's gradient to the parameters', of its text and of what the unrouted
        model's states say of it; return what it adds to the sums."""
        learnt = {} if teacher is None else {"teacher": teacher, "share": self._distill}
        task = self._forward(batch, **learnt) / whole.supervised
        penalty = self._penalty(whole, micro_batches)
        counts = self._counts()
        (task + penalty).backward()
        if self._zero3 is not None:
            # Modules whose backward hooks never fire, such as the frozen lower layers, still hold
            # weights.
            self._zero3.release_backward_leftovers()
        return StepSums(loss_task=task.detach(), loss_penalty=penalty.detach(), counts=counts)

    @contextlib.contextmanager
    def _noisy(self) -> Iterator[None]:
        """Disturb decisions in here: also in the backward pass, which may compute them again."""
        self.routers.steering.noise = self._noise
        try:
            yield
        finally:
            self.routers.steering.noise = 0.0

    def _penalty(self, whole: GlobalBatch, micro_batches: int) -> Tensor:
        """Return the last forward pass's share of the penalty of the global batch."""
        if not self._has_penalty:
            return 0 * self.routers.penalty()
        if self.routers.config.budget == "global":
            return self.routers.penalty(whole.units)
        return self.routers.penalty() / (micro_batches * self._topology.num_replicas)

    def _global_batch(self, batches: Sequence[Batch]) -> GlobalBatch:
        """Return what the global batch holds. Collective."""
        # The stages of a pipeline see the same rows; they count once.
        counted = batches if self._topology.is_last_stage else ()
        units = sum(self._units(batch) for batch in counted) * self._num_routed
        return GlobalBatch.of(counted, units)

    def _units(self, batch: Batch) -> int:
        """Return how many decisions each routed layer makes about a batch."""
        counts = batch.counts
        by_token = self.routers.config.unit == "token"
        return counts.tokens * self.routers.choices if by_token else counts.samples


def _gradient(gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if gate.grad is None else gate.grad
