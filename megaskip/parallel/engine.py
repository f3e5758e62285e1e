"""One optimizer step over a global batch, on one process, on replicas, or under ZeRO-3: the same
numbers.

Task loss and penalty are divided by the supervised tokens and routed units of the whole global
batch, so that what micro-batches and ranks add up to does not depend on how the batch was split.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import RunConfig
from megaskip.data import Batch
from megaskip.data.row import IGNORED
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.parallel.results import EvalResult, StepResult, Totals, quarters, share_of
from megaskip.parallel.topology import Topology
from megaskip.routing import Counts, Measured, RouterSet, RoutingDecision


class Engine:
    """Trains what requires grad of a task loss, or its routers, and evaluates. Every method is
    collective."""

    def __init__(
        self,
        module: nn.Module,
        routers: RouterSet | None,
        config: RunConfig,
        topology: Topology,
        zero3: Any = None,
    ) -> None:
        self.module = module
        self.routers = routers
        self._topology = topology
        self._zero3 = zero3
        self._max_grad_norm = config.optim.max_grad_norm
        self._distill, self._noise = config.optim.distill, config.optim.noise
        if routers is not None:
            routers.steering.temperature = config.optim.temperature
        source: nn.Module = module.model if routers is None else routers  # type: ignore[assignment]
        self.parameters = {name: p for name, p in source.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            foreach=True,
        )

        _materialise(self.optimizer)

    def train_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches `batches` at learning rate `lr`.

        `progress` is the share of the run that is done after it (see RouterSet.steer).
        """
        batches = [batch.to(self._topology.device) for batch in batches]
        totals = self._totals(batches)
        self.optimizer.zero_grad(set_to_none=False)
        with self._noisy():
            sums = self._micro_steps(batches, totals)
        grad_norm = self._reduce_gradients(sums)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return self._result(sums.tolist(), totals, grad_norm, progress)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch | None], *, routed: bool) -> EvalResult:
        """Return held-out loss and capacity over this and all other ranks' `batches`.

        Every rank passes as many; a rank that has run out passes None, and takes part in the
        collectives with a batch that counts for nothing. Decisions are those of the asked capacity;
        `routed=False` keeps everything: the dense model.
        """
        routers = self.routers
        sums = self._zeros(5)
        with contextlib.ExitStack() as contexts:
            if routers is not None:
                contexts.enter_context(routers.steering.budget.settled())
            if routers is not None and not routed:
                contexts.enter_context(routers.disabled())
            for batch, loss in self.forwards(batches):
                if batch is not None:
                    sums += self._eval_sums(batch, loss)
        sum_over_ranks(sums)
        return EvalResult.of(sums.tolist())

    @torch.no_grad()
    def token_losses(self, batch: Batch | None) -> tuple[Batch, Tensor]:
        """Return (the batch that ran, the loss of each of its supervised tokens, float32 [N]): of
        `batch`, or of one that counts for nothing. Collective; without pipeline stages."""
        mine = batch.to(self._topology.device) if batch is not None else self._filler()
        return mine, self._forward(mine, each=True)

    def scores(self) -> dict[int, Tensor]:
        """Return the router scores of this rank's last micro-batch, by layer; for histograms.
        Collective; the first rank gets all layers'."""
        return {k: d.logit.detach().sigmoid() for k, d in self.own_decisions().items()}

    # -- what a pipeline does in its own way

    def _micro_steps(self, batches: Sequence[Batch], totals: Totals) -> Tensor:
        """Add the gradients of all micro-batches; returns their [task loss, penalty, counts]."""
        sums = self._zeros(2)
        for batch in batches:
            sums += self._micro_step(batch, totals, len(batches))
        return sums

    def forwards(self, batches: Sequence[Batch | None]) -> Iterator[tuple[Batch | None, Tensor]]:
        """Yield each batch with its summed loss, right after its forward pass.

        For None a batch that counts for nothing runs, so that this rank is in every collective.
        """
        for batch in batches:
            mine = batch.to(self._topology.device) if batch is not None else self._filler()
            yield batch, self._forward(mine)

    def own_decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions that this rank made."""
        return self.routers.decisions() if self.routers is not None else {}

    def _counts(self) -> Tensor:
        """Return the packed Counts of this rank's decisions, zero elsewhere."""
        return self.routers.counts().pack() if self.routers is not None else self._zeros(0)

    def _eval_sums(self, batch: Batch, loss: Tensor) -> Tensor:
        """Return [loss, supervised tokens, rows, sums of their shares and squares, counts]."""
        shares = self.routers.shares() if self.routers is not None else self._zeros(0)
        head = torch.stack(
            [loss, loss.new_tensor(batch.num_supervised()), loss.new_tensor(len(shares))]
        )
        sums = [head.double(), shares.sum()[None], shares.square().sum()[None], self._counts()]
        return torch.cat(sums)

    # -- micro-batches

    def _filler(self) -> Batch:
        ids = torch.zeros(1, 8, dtype=torch.int64, device=self._topology.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        return Batch(
            input_ids=ids,
            labels=torch.full_like(ids, IGNORED),
            token_mask=real,
            prompt_mask=real,
            position_ids=ids + torch.arange(8, device=ids.device),
        )

    def _micro_step(self, batch: Batch, totals: Totals, micro_batches: int) -> Tensor:
        """Add one micro-batch's gradient; returns its [task loss, penalty, kept per layer, units
        per layer]."""
        task = self._learn(batch) / totals.supervised
        penalty = self._penalty(totals, micro_batches, like=task)
        counts = self._counts()
        (task + penalty).backward()
        if self._zero3 is not None:
            # Modules whose backward hooks never fire, such as the frozen lower layers, still hold
            # weights.
            self._zero3.release_backward_leftovers()
        return torch.cat([torch.stack([task.detach(), penalty.detach()]).double(), counts])

    @contextlib.contextmanager
    def _noisy(self) -> Iterator[None]:
        """Disturb decisions in here: also in the backward pass, which may compute them again."""
        if self.routers is not None:
            self.routers.steering.noise = self._noise
        try:
            yield
        finally:
            if self.routers is not None:
                self.routers.steering.noise = 0.0

    def _learn(self, batch: Batch) -> Tensor:
        """Return the loss to train on: of the text, and of what the unrouted model says of it."""
        if self.routers is None:
            return self._forward(batch)
        taught: dict[str, Any] = {}
        if self._distill:
            with self.routers.disabled(), torch.no_grad():
                taught["teacher"] = self._forward(batch, states_only=True)
            taught["share"] = self._distill
        return self._forward(batch, **taught)

    def _forward(self, batch: Batch, **how: Any) -> Tensor:
        self._set_batch(batch)
        loss: Tensor = self.module(
            batch.input_ids, batch.attention_mask, batch.position_ids, batch.labels, **how
        )
        return loss

    def _set_batch(self, batch: Batch) -> None:
        if self.routers is not None:
            self.routers.set_batch(batch.token_mask, batch.prompt_mask, batch.segment_ids)

    def _penalty(self, totals: Totals, micro_batches: int, like: Tensor) -> Tensor:
        routers = self.routers
        if routers is None:
            return like.new_zeros(())
        if routers.config.budget == "global":
            return routers.penalty(totals.units)
        return routers.penalty() / (micro_batches * self._topology.num_replicas)

    def _totals(self, batches: Sequence[Batch]) -> Totals:
        """Return what the global batch holds. Collective."""
        # The stages of a pipeline see the same rows; they count once.
        batches = batches if self._topology.is_last_stage else ()
        local = torch.tensor(
            [
                sum(batch.num_supervised() for batch in batches),
                sum(self._units(batch) for batch in batches) * self._num_routed,
                sum(int(batch.token_mask.sum()) for batch in batches),
            ],
            dtype=torch.float64,
            device=self._topology.device,
        )
        sum_over_ranks(local)
        supervised, units, tokens = local.tolist()
        return Totals(supervised=max(supervised, 1.0), units=max(units, 1.0), tokens=tokens)

    def _units(self, batch: Batch) -> int:
        if self.routers is None:
            return 0
        if self.routers.config.unit == "token":
            return int(batch.token_mask.sum())
        if batch.segment_ids is None:
            return int(batch.token_mask.any(dim=1).sum())
        return int((batch.segment_ids.amax(dim=1) + 1).sum())

    def _reduce_gradients(self, sums: Tensor) -> float:
        """Sum gradients and `sums` over the ranks, clip, and return the gradient's norm.
        Collective."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        sum_over_ranks(sums)
        if self._topology.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            sum_over_ranks(flat)
            for gradient, part in zip(
                gradients, flat.split([g.numel() for g in gradients]), strict=True
            ):
                gradient.copy_(part.view_as(gradient))
        limit = self._max_grad_norm or float("inf")
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def _result(
        self, sums: list[float], totals: Totals, grad_norm: float, progress: float | None
    ) -> StepResult:
        kept, units, *_ = quarters(sums[2:])
        if self.routers is not None:
            counts = Counts.unpack(torch.tensor(sums[2:], dtype=torch.float64))
            self.routers.steer(Measured.of(counts), progress=progress)
        return StepResult(
            loss_task=sums[0],
            loss_penalty=sums[1],
            capacity=share_of(sum(kept), sum(units)) if kept else 1.0,
            capacity_per_layer=tuple(map(share_of, kept, units)),
            grad_norm=grad_norm,
            tokens=int(totals.tokens),
            supervised_fraction=totals.supervised / max(totals.tokens, 1.0),
        )

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self._topology.world_size

    @property
    def _num_routed(self) -> int:
        return len(self.routers.layers) if self.routers is not None else 0

    def _zeros(self, head: int) -> Tensor:
        """Return float64 zeros for `head` sums and the counts of the routed layers."""
        size = head + 4 * self._num_routed
        return torch.zeros(size, dtype=torch.float64, device=self._topology.device)


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state now instead of at the first step, so that it can be measured and
    restored."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
