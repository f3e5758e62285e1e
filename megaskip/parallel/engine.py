"""One optimizer step over a global batch, on one process, on replicas, or under ZeRO-3: the same
numbers.

Task loss and penalty are divided by the supervised tokens and routed units of the whole global
batch, so that what micro-batches and ranks add up to does not depend on how the batch was split.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.data.collate import placeholder_batch
from megaskip.parallel.cached_prefix import CachedPrefix
from megaskip.parallel.optimizer import (
    clear_gradients,
    make_adamw,
    reduce_gradients,
    set_learning_rate,
)
from megaskip.parallel.position_losses import PositionLosses
from megaskip.parallel.results import (
    EvalResult,
    EvalSums,
    GlobalBatch,
    PendingStep,
    StepResult,
    StepSums,
)
from megaskip.parallel.sequence import SequenceGroup
from megaskip.parallel.shared_moments import SharedMoments
from megaskip.parallel.topology import Topology
from megaskip.routing import Counts, Measured, Pooling, RouterSet, RoutingDecision


class Engine:
    """Trains the routers of the model in `module`, and evaluates. Every method is collective.

    `zero3` is the handle of ZeRO-3's hooks, where the model is sharded; `group` the ranks that
    share rows, each with its share of their tokens in its batches.
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
        self.module = module
        self.routers = routers
        self._topology = topology
        self._zero3 = zero3
        self._group = group
        self.prefix: CachedPrefix | None = None
        """What gives the states in front of the first routed layer, where they are not computed."""
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

    @torch.no_grad()
    def evaluate(
        self,
        batches: Sequence[Batch | None],
        *,
        routed: bool,
        adapted: bool = True,
        by_position: PositionLosses | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> EvalResult:
        """Return held-out loss and capacity over this and all other ranks' `batches`.

        Every rank passes as many batches; one that has run out passes None, and takes part in the
        collectives with a batch that counts for nothing. Decisions are those of the asked capacity;
        `routed=False` keeps everything: the dense model; `adapted=False` leaves adapters out, too.
        `by_position` takes in the loss of each token, where there are no pipeline stages.
        `check` as in `forwards`.
        """
        sums = EvalSums.zeros(self._num_routed, device=self._topology.device)
        everything_runs = contextlib.nullcontext() if routed else self.routers.disabled()
        as_asked = contextlib.nullcontext() if adapted else self._without_adapters()
        with everything_runs, as_asked, self.routers.steering.budget.settled():
            for batch, loss in self._losses_of(batches, by_position, check):
                if batch is not None:
                    sums += self._eval_sums(batch, loss)
        return sums.over_ranks().on_host().result()

    @torch.no_grad()
    def token_losses(self, batch: Batch | None) -> tuple[Batch, Tensor]:
        """Run one forward pass; return (the batch that ran, the loss of each of its supervised
        tokens, float32 [N]). For None a placeholder runs. Collective; without pipeline stages."""
        ran = self._on_device(batch)
        return ran, self._forward(ran, each=True)

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

    def scores(self) -> dict[int, Tensor]:
        """Return the router scores of this rank's last micro-batch, by layer; for histograms.
        Collective; the first rank gets all layers'."""
        return {k: d.logit.detach().sigmoid() for k, d in self.own_decisions().items()}

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

    def forwards(
        self, batches: Sequence[Batch | None], check: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Batch | None, Tensor]]:
        """Yield each batch with its summed loss, right after its forward pass.

        For None a placeholder runs, so that this rank takes part in every collective.
        `check` is called before each of `batches`, on every rank as often: it may communicate, and
        raise on all ranks to end the pass.
        """
        for batch in batches:
            check()
            yield batch, self._forward(self._on_device(batch))

    @property
    def model(self) -> nn.Module:
        """Return the Hugging Face model; without pipeline stages."""
        return self.module.get_submodule("model")

    @property
    def own_layers(self) -> Sequence[int]:
        """Return the routed layers that this rank runs."""
        return self.routers.layers

    def own_decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions that this rank made."""
        return self.routers.decisions()

    def _counts(self) -> Counts:
        """Return the counts of the last forward pass's decisions that this rank made; zero for
        other layers."""
        return self.routers.counts()

    def _eval_sums(self, batch: Batch, loss: Tensor) -> EvalSums:
        """Return what this rank adds to the sums for the forward pass of `batch`, whose summed loss
        is `loss`."""
        shares = self.routers.shares()
        # Ranks that share rows know the shares of all of them.
        counted = loss.new_full((), self._topology.sequence_rank == 0, dtype=torch.float64)
        return EvalSums(
            loss=loss,
            supervised=loss.new_full((), batch.counts.supervised, dtype=torch.float64),
            rows=counted * len(shares),
            shares=counted * shares.sum(),
            squared_shares=counted * shares.square().sum(),
            counts=self._counts(),
        )

    def _losses_of(
        self,
        batches: Sequence[Batch | None],
        by_position: PositionLosses | None,
        check: Callable[[], object],
    ) -> Iterator[tuple[Batch | None, Tensor]]:
        """Yield what `forwards` does, having told `by_position` of each token."""
        if by_position is None:
            yield from self.forwards(batches, check)
            return
        for batch in batches:
            check()
            ran, losses = self.token_losses(batch)
            if batch is not None:
                by_position.add(ran, losses)
            yield batch, losses.double().sum()

    # -- micro-batches

    def _on_device(self, batch: Batch | None) -> Batch:
        topology = self._topology
        if batch is not None:
            return batch.to(topology.device)
        share = {"rank": topology.sequence_rank, "size": topology.sequence_size}
        return placeholder_batch(topology.device, **share)

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

    def _without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has no adapters."""
        adapters = self.routers.adapters
        return contextlib.nullcontext() if adapters is None else adapters.disabled()

    def _teacher_states(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """Return what the frozen model's last hidden states [N, D] are at the supervised tokens of
        each micro-batch, unrouted and without adapters; None without --distill."""
        if not self._distill:
            return [None] * len(batches)
        with self.routers.disabled(), self._without_adapters(), torch.no_grad():
            return [self._forward(batch, states_only=True) for batch in batches]

    def _pooling(self, batch: Batch) -> Pooling:
        masks = (batch.token_mask, batch.prompt_mask, batch.segment_ids)
        pooling = self.routers.pooling(*masks, batch.counts.segments)
        if self._group is None:
            return pooling
        return self._group.shared(pooling, batch, pool=self.routers.config.pool)

    def _forward(self, batch: Batch, **how: Any) -> Tensor:
        self.routers.state.begin(self._pooling(batch), described=True)
        if self.prefix is not None:
            how["entering"] = self.prefix.entering(batch)
        loss: Tensor = self.module(
            batch.input_ids,
            batch.attention_mask,
            batch.position_ids,
            batch.labels,
            predicting=batch.predicting,
            targets=batch.targets,
            lengths=batch.lengths,
            **how,
        )
        return loss

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

    @property
    def device(self) -> torch.device:
        """Return the device of this rank."""
        return self._topology.device

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._topology.world_size

    @property
    def num_replicas(self) -> int:
        """Return how many copies of the model read text of their own."""
        return self._topology.num_replicas

    def number_over_replicas(self, turn: int) -> int:
        """Return the number, among the batches of all replicas, of this one's batch `turn`, when
        they take turns."""
        return turn * self.num_replicas + self._topology.replica

    @property
    def _num_routed(self) -> int:
        return len(self.routers.layers)


def _gradient(gate: Tensor) -> Tensor:
    return torch.zeros_like(gate) if gate.grad is None else gate.grad
