"""What a trainer needs of an engine, whatever the engine trains."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megaskip.data import Batch
from megaskip.parallel.results import PendingStep, StepResult


class StepEngine(Protocol):
    """Takes optimizer steps over the batches of all ranks."""

    @property
    def module(self) -> nn.Module:
        """Return the task loss that is called, with the model in it."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return what trains, by name; whole on every rank."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the `parameters` that this rank updates; its state exists from the
        start."""
        ...

    def optimizer_states(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return AdamW's state by parameter, of all of them on the first rank. Collective."""
        ...

    def train_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> StepResult:
        """Take one optimizer step as `launch_step` does, and wait for its numbers. Collective."""
        ...

    def launch_step(
        self, batches: Sequence[Batch], lr: float, progress: float | None = None
    ) -> PendingStep:
        """Take one optimizer step over this rank's micro-batches at learning rate `lr`; `progress`
        is the share of the run that is done after it. A GPU is not waited for. Collective."""
        ...
