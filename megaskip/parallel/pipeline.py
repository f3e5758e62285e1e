"""The stages of a pipeline as one engine: 1F1B, with the routing masks carried from stage to stage.

What crosses a boundary is the hidden states [B, T, D] and what all routed layers so far decided,
keep [n, B, U] float32; their gradients come back. So the last stage has the penalty of the whole
model, and the routers of every stage learn from it. What else a stage needs of a batch (ids, masks,
positions, labels) it reads itself, for all stages of a replica are fed the same rows; so shapes are
known, and may differ from batch to batch.

DeepSpeed's schedules say who does what when. Its executor is not used: it runs one backward pass
for every carried tensor, wants a trainable parameter and a gradient on every stage, and sends
gradients to stages of a frozen model that have no use for them.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.arch.stage import DecoderStage
from megaskip.arch.task_loss import predicting_states
from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.extras import extra
from megaskip.parallel.engine import Engine
from megaskip.parallel.p2p import P2PChannel
from megaskip.parallel.results import EvalSums, GlobalBatch, StepSums
from megaskip.parallel.topology import Topology
from megaskip.routing import Counts, Pooling, RouterSet, RoutingDecision
from megaskip.routing.handover import carried_keep, receive_keep

with extra("train"):
    from deepspeed.runtime.pipe import schedule


class PipelineEngine(Engine):
    """An Engine whose module is one stage; the stages of a replica are neighbouring ranks."""

    module: DecoderStage

    def __init__(
        self, stage: DecoderStage, routers: RouterSet, config: RunConfig, topology: Topology
    ) -> None:
        super().__init__(stage, routers, config, topology)
        self._own = stage.layer_range.owned(routers.layers)
        self._below = sum(layer < stage.layer_range.first for layer in routers.layers)
        """Routed layers of the stages before this one."""
        self._dtype = stage.dtype
        self._previous, self._next = P2PChannel(topology.rank - 1), P2PChannel(topology.rank + 1)
        self._logits: dict[int, Tensor] = {}

    @property
    def bytes_sent(self) -> list[int]:
        """Return the bytes sent to the next stage so far: of hidden states, and of keep if any."""
        return self._next.bytes_sent

    def scores(self) -> dict[int, Tensor]:
        """Return the router scores of the first replica's last micro-batch, by layer, on the first
        rank. Collective."""
        everyone: list[Any] = [{}] * self._topology.world_size
        logits = {layer: logit.cpu() for layer, logit in self._logits.items()}
        dist.gather_object(logits, everyone if self._topology.is_first else None)
        stages = everyone[: self._topology.num_stages]
        return {layer: logit.sigmoid() for stage in stages for layer, logit in stage.items()}

    @property
    def _learns(self) -> bool:
        """Return whether something in this stage or below it has a gradient."""
        return self.routers.lowest_learning_layer < self.module.layer_range.stop

    @property
    def _below_learns(self) -> bool:
        """Return whether something in the stages before this one has a gradient."""
        return self.routers.lowest_learning_layer < self.module.layer_range.first

    # -- the two schedules

    def _micro_steps(
        self,
        batches: Sequence[Batch],
        whole: GlobalBatch,
        teachers: Sequence[Tensor | None] | None = None,
    ) -> StepSums:
        sums = StepSums.zeros(self._num_routed, device=self._topology.device)
        poolings = [self._pooling(batch) for batch in batches]
        teachers = self._teacher_states(batches) if teachers is None else teachers
        # Only what a gradient will come back for is kept until then.
        inputs: dict[int, list[Tensor]] = {}
        outputs: dict[int, list[Tensor]] = {}
        gradients: dict[int, list[Tensor]] = {}
        for task, n in self._tasks(schedule.TrainSchedule, len(batches)):
            if task is schedule.RecvActivation:
                inputs[n] = self._receive(batches[n], poolings[n])
            elif task is schedule.ForwardPass:
                arrived = inputs.get(n) if self._below_learns else inputs.pop(n, None)
                outputs[n] = self._run_stage(batches[n], poolings[n], arrived, teachers[n])
                if self._topology.is_last_stage:
                    outputs[n] = self._losses(outputs[n][0], whole, len(batches))
                sums += self._step_sums(outputs[n])
            elif task is schedule.SendActivation:
                self._next.send(outputs[n] if self._learns else outputs.pop(n))
            elif task is schedule.RecvGrad and self._learns:
                gradients[n] = self._next.receive([_empty_like(output) for output in outputs[n]])
            elif task is schedule.BackwardPass and self._learns:
                # Layers whose activations were not kept decide again, on this batch's masks.
                self.routers.state.begin(poolings[n])
                torch.autograd.backward(outputs.pop(n), gradients.pop(n, None))
            elif task is schedule.SendGrad and self._below_learns:
                self._previous.send([tensor.grad for tensor in inputs.pop(n)])
        self._finish()
        return sums

    def forwards(
        self, batches: Sequence[Batch | None], check: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Batch | None, Tensor]]:
        """Yield each batch with its summed loss (zero before the last stage), once it has run.

        Replicas do not wait for each other, so None is passed over; for the same reason `check` is
        called for all batches before the first one runs: stages must not meet in between.
        """
        real = []
        for batch in batches:
            check()
            if batch is not None:
                real.append(batch.to(self._topology.device))
        for n, outputs in self._forward_only(real):
            yield real[n], outputs[0] if self._topology.is_last_stage else torch.zeros(())

    def _teacher_states(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """Return what the frozen model's last hidden states [N, D] are at the supervised tokens
        of each micro-batch, on the last stage; None elsewhere, and without --distill."""
        if not self._distill:
            return [None] * len(batches)
        with self.routers.disabled(), self._without_adapters(), torch.no_grad():
            states = dict(self._forward_only(batches, states_only=True))
        return [states[n][0] if self._topology.is_last_stage else None for n in range(len(batches))]

    def _forward_only(
        self, batches: Sequence[Batch], *, states_only: bool = False
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield the number of each micro-batch and what leaves this stage, once it has run."""
        poolings = [self._pooling(batch) for batch in batches]
        inputs: dict[int, list[Tensor]] = {}
        outputs: dict[int, list[Tensor]] = {}
        for task, n in self._tasks(schedule.InferenceSchedule, len(batches)):
            if task is schedule.RecvActivation:
                inputs[n] = self._receive(batches[n], poolings[n])
            elif task is schedule.ForwardPass:
                arrived = inputs.pop(n, None)
                outputs[n] = self._run_stage(
                    batches[n], poolings[n], arrived, states_only=states_only
                )
                yield n, outputs[n]
            elif task is schedule.SendActivation:
                self._next.send(outputs.pop(n))
        self._finish()

    def _tasks(self, kind: Any, micro_batches: int) -> Iterator[tuple[type, int]]:
        """Yield what this stage does: the kind of instruction and the number of its micro-batch.

        Schedules name buffers; every kind of instruction meets the micro-batches in order.
        """
        stages = {"stages": self._topology.num_stages, "stage_id": self._topology.stage}
        turns: Counter[type] = Counter()
        for instructions in kind(micro_batches=micro_batches, **stages):
            for instruction in instructions:
                task = type(instruction)
                yield task, turns[task]
                turns[task] += 1

    # -- one micro-batch

    def _run_stage(
        self,
        batch: Batch,
        pooling: Pooling,
        inputs: list[Tensor] | None,
        teacher: Tensor | None = None,
        *,
        states_only: bool = False,
    ) -> list[Tensor]:
        """Return what leaves this stage: hidden states and keep; on the last stage the summed
        loss, with a share of each label as the states `teacher` [N, D] predict it, or with
        `states_only` the states that predict the supervised tokens."""
        routers, stage = self.routers, self.module
        routers.state.begin(pooling, described=True)
        hidden_states, *keep = inputs or [batch.input_ids]
        if keep:
            receive_keep(routers, keep[0])
        told = (batch.attention_mask, batch.position_ids, batch.lengths)
        hidden_states = stage(hidden_states, *told)
        self._logits = {k: d.logit.detach() for k, d in self.own_decisions().items()}
        if stage.head is not None and states_only:
            return [predicting_states(hidden_states, batch.labels, batch.predicting)]
        if stage.head is not None:
            learnt = (batch.labels, teacher, self._distill)
            return [stage.head.of_batch(hidden_states, *learnt, predicting=batch.predicting)]
        decided = carried_keep(routers) if self._learns else None
        return [hidden_states] if decided is None else [hidden_states, decided]

    def _losses(self, loss: Tensor, whole: GlobalBatch, micro_batches: int) -> list[Tensor]:
        task = loss / whole.supervised
        return [task, self._penalty(whole, micro_batches)]

    def _step_sums(self, outputs: Sequence[Tensor]) -> StepSums:
        """Return what a forward pass adds to the sums: the losses on the last stage, on each stage
        the counts of its own layers. `outputs` are those of `_run_stage`, or the losses."""
        counts = self._counts()
        if not self._topology.is_last_stage:
            nothing = StepSums.zeros(self._num_routed, device=self._topology.device)
            return dataclasses.replace(nothing, counts=counts)
        task, penalty = outputs
        return StepSums(loss_task=task.detach(), loss_penalty=penalty.detach(), counts=counts)

    def _eval_sums(self, batch: Batch, loss: Tensor) -> EvalSums:
        if self._topology.is_last_stage:
            return super()._eval_sums(batch, loss)
        nothing = EvalSums.zeros(self._num_routed, device=self._topology.device)
        return dataclasses.replace(nothing, counts=self._counts())

    @property
    def own_layers(self) -> Sequence[int]:
        return self._own

    def own_decisions(self) -> dict[int, RoutingDecision]:
        return {k: d for k, d in self.routers.decisions().items() if k in self._own}

    def _counts(self) -> Counts:
        if not self._own:
            return Counts.zeros(self._num_routed, device=self._topology.device)
        return self.routers.counts(self._own).among(self._num_routed, self._below)

    # -- across the boundaries

    def _receive(self, batch: Batch, pooling: Pooling) -> list[Tensor]:
        """Return what the stage before sent: hidden states, and keep if it lies above a router."""
        rows, tokens = batch.input_ids.shape
        shapes = [((rows, tokens, self.module.hidden_size), self._dtype)]
        if self._below:
            shapes.append(((self._below, *pooling.unit_mask.shape), torch.float32))
        device = self._topology.device
        memory = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
        received = self._previous.receive(memory)
        learns = self._below_learns and torch.is_grad_enabled()
        return [tensor.requires_grad_(learns) for tensor in received]

    def _finish(self) -> None:
        self._previous.wait()
        self._next.wait()


def _empty_like(tensor: Tensor) -> Tensor:
    """Return memory for the gradient of a tensor, contiguous whatever the tensor's strides are."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
