"""Forward passes of a model with routers over the batches of all ranks, and what they measure: the
same numbers on one process, on replicas, or under ZeRO-3.

Knows no optimizer: the engine that learns, in engine.py, builds on this one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.data import Batch
from megaskip.data.collate import placeholder_batch
from megaskip.parallel.cached_prefix import CachedPrefix
from megaskip.parallel.position_losses import PositionLosses
from megaskip.parallel.results import EvalResult, EvalSums
from megaskip.parallel.sequence import SequenceGroup
from megaskip.parallel.topology import Topology
from megaskip.routing import Counts, Pooling, RouterSet, RoutingDecision


class ForwardEngine:
    """Runs batches through the model in `module`, whose routers decide. Every method is collective.

    `group` are the ranks that share rows, each with its share of their tokens in its batches.
    """

    def __init__(
        self,
        module: nn.Module,
        routers: RouterSet,
        topology: Topology,
        group: SequenceGroup | None = None,
    ) -> None:
        self.module = module
        self.routers = routers
        self._topology = topology
        self._group = group
        self.prefix: CachedPrefix | None = None
        """What gives the states in front of the first routed layer, where they are not computed."""

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

    def scores(self) -> dict[int, Tensor]:
        """Return the router scores of this rank's last micro-batch, by layer; for histograms.
        Collective; the first rank gets all layers'."""
        return {k: d.logit.detach().sigmoid() for k, d in self.own_decisions().items()}

    # -- what a pipeline does in its own way

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

    # -- passes

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

    def _on_device(self, batch: Batch | None) -> Batch:
        topology = self._topology
        if batch is not None:
            return batch.to(topology.device)
        share = {"rank": topology.sequence_rank, "size": topology.sequence_size}
        return placeholder_batch(topology.device, **share)

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

    def _pooling(self, batch: Batch) -> Pooling:
        masks = (batch.token_mask, batch.prompt_mask, batch.segment_ids)
        pooling = self.routers.pooling(*masks, batch.counts.segments)
        if self._group is None:
            return pooling
        return self._group.shared(pooling, batch, pool=self.routers.config.pool)

    def _without_adapters(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has no adapters."""
        adapters = self.routers.adapters
        return contextlib.nullcontext() if adapters is None else adapters.disabled()

    # -- ranks

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
