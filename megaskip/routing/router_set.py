"""The routers of a model that learns: Routers with a budget, a penalty, and counts of what ran."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import RouterConfig
from megaskip.config.routing import UNDECIDED
from megaskip.routing.adapters import AdapterSet
from megaskip.routing.budget import Measured, layer_hinge
from megaskip.routing.compensation import describe_compensation, is_compensation
from megaskip.routing.counts import Counts
from megaskip.routing.executor import Executor
from megaskip.routing.experts import Experts
from megaskip.routing.routers import Routers
from megaskip.routing.steering import Steering
from megaskip.routing.thresholds import threshold_of
from megaskip.routing.training_executor import DenseExecutor
from megaskip.routing.training_gate import TrainingGate


class RouterSet(Routers):
    """All routers of a model, keyed by absolute layer index and target: "12.attn.weight" [1, D]
    float32.

    Registered on a model as `skip_routers`, or kept beside one that DeepSpeed shards. What belongs
    to one forward pass is in `state`, what moves the thresholds in `steering`.
    """

    config: RouterConfig
    gates: Mapping[int, TrainingGate]

    def __init__(
        self,
        config: RouterConfig,
        layers: Sequence[int],
        hidden_size: int,
        *,
        experts: Experts | None = None,
        device: torch.device | None = None,
    ) -> None:
        steering = Steering(config, layers)
        super().__init__(
            config,
            layers,
            hidden_size,
            executor=DenseExecutor(),
            experts=experts,
            thresholds=steering,
            gate=TrainingGate,
            device=device,
        )
        self.steering = steering
        """The same object as `thresholds`."""
        if config.freeze_routers:  # what they read does not learn to change what they decide
            for layer in self.layers:
                self.router(layer).register_forward_pre_hook(_detached)

    @property
    def executor(self) -> Executor:
        """Return what runs the sublayers, given a decision; one of training or of inference."""
        return self.state.executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        self.state.executor = executor

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return what learns, by name: routers, compensations, and adapters if there are any; where
        nothing is decided (budget "static" or "dense"), or routers are frozen, no routers."""
        learns = self.config.budget not in UNDECIDED and not self.config.freeze_routers
        own = {n: p for n, p in self.named_parameters() if is_compensation(n) or learns}
        return own if self.adapters is None else own | self.adapters.trained_parameters()

    @property
    def adapters(self) -> AdapterSet | None:
        """Return the LoRA adapters that belong to these routers, if any; not part of this module's
        state dict."""
        adapters: AdapterSet | None = self.__dict__.get("_adapters")
        return adapters

    def take_adapters(self, adapters: AdapterSet | None) -> None:
        """Let `adapters`, which the model has, be trained, saved and loaded with these routers."""
        # Not as an attribute: their tensors would be among those of the routers.
        self.__dict__["_adapters"] = adapters

    @property
    def lowest_learning_layer(self) -> int:
        """Return the lowest layer that learns, or whose router decides: gradients end there."""
        lowest = self.layers[0]
        if self.adapters is None or not self.adapters.learns:
            return lowest
        return min(lowest, self.adapters.lowest)

    def describe_compensation(self) -> str | None:
        """Return what compensations there are in one line; None where there are none."""
        config = self.config
        if config.compensation == "none":
            return None
        count = sum(p.numel() for n, p in self.named_parameters() if is_compensation(n))
        kind, rank = config.compensation, config.compensation_rank
        return describe_compensation(kind, rank, layers=len(self.layers), parameters=count)

    # -- after the forward pass

    def penalty(self, total_units: Tensor | float | None = None) -> Tensor:
        """Return the capacity penalty of the last forward pass, a float32 scalar with gradient.

        budget="global" divides by `total_units`, the routed units of the whole global batch (those
        of this forward pass without it), so that the penalties of all micro-batches and ranks add
        up to the global one. budget="layer" is the published hinge of this forward pass (paper
        equations 9 and 10); "static" and "dense" have none.
        """
        decisions = self.state.decisions_of(self.layers)
        if self.config.budget in UNDECIDED:
            return 0 * torch.stack([decision.kept() for decision in decisions]).sum()
        if self.config.budget == "layer":
            return layer_hinge(decisions, self.config.capacity, self.config.penalty_weight)
        return self.steering.penalty(decisions, total_units)

    def shares(self) -> Tensor:
        """Return float64 [B]: the share of units that ran in each row of the last forward pass.
        Collective among processes that share rows."""
        decisions = self.state.decisions_of(self.layers)
        kept = torch.stack([(d.keep.detach() * d.unit_mask).sum(1) for d in decisions]).sum(0)
        units = torch.stack([d.unit_mask.sum(1) for d in decisions]).sum(0)
        pooling = self.state.pooling
        if pooling is not None and pooling.add_up is not None:
            kept, units = pooling.add_up(torch.stack([kept, units.to(kept)]))
        return kept.double() / units.clamp(min=1)

    def counts(self, layers: Sequence[int] | None = None) -> Counts:
        """Return the sums over the last forward pass's units, of `layers` (all routed ones without
        it)."""
        return Counts.of(self.state.decisions_of(self.layers if layers is None else layers))

    # -- steering

    def steer(self, measured: Measured | None = None, *, progress: float | None = None) -> None:
        """Steer towards the asked capacity after an optimizer step (budget="global").

        `measured` is what the global batch did, the same on every rank; the last forward pass
        without it. `progress` is the share of the run that is done: the target then falls
        gradually.
        """
        if self.config.budget == "global":
            self.steering.budget.steer(measured or Measured.of(self.counts()), progress)

    def settled_config(self) -> RouterConfig:
        """Return the configuration with the thresholds where steering has put them."""
        return self.steering.settled(self.config)

    def place(self, logits: Sequence[float]) -> None:
        """Put the threshold of each routed layer, in their order, at a logit; infinite for none or
        all."""
        self.configure(dataclasses.replace(self.config, threshold=tuple(map(threshold_of, logits))))

    # -- deprecated names

    def announce(self, *args: Any, **kwargs: Any) -> None:
        """Do what `set_batch` does. Deprecated."""
        _say_renamed("announce", "set_batch")
        self.set_batch(*args, **kwargs)

    def every_gate_open(self) -> contextlib.AbstractContextManager[None]:
        """Do what `disabled` does. Deprecated."""
        _say_renamed("every_gate_open", "disabled")
        return self.disabled()


def _say_renamed(old: str, new: str) -> None:
    warnings.warn(
        f"megaskip: RouterSet.{old}() is now called {new}(), with the same arguments; the old name "
        "goes in 0.4",
        FutureWarning,
        stacklevel=3,
    )


def _detached(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cut the gradient of what a router reads."""
    return tuple(read.detach() for read in inputs)
