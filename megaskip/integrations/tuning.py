"""What a step of another library's trainer must do for the routers.

Knows routers, batches and a trainer's settings; `trainer.py` beside it knows the trainer's methods.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.arch import find_decoder
from megaskip.arch.checkpointing import set_layer_checkpointing
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import fill_routers, save_routers
from megaskip.errors import ConfigError
from megaskip.integrations.batches import describe_inputs
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.routing import Counts, Measured, RouterSet

ROUTERS = "routers"
"""Folder of the routers in a trainer's output folder and in its checkpoints."""
_STEERING = "steering.json"


class RouterTuning:
    """The routers of a trainer's model, and what they did since the last optimizer step."""

    def __init__(self, model: Any, routers: RouterSet, base: BaseModel) -> None:
        self.model, self.routers, self.base = model, routers, base
        self._micro_batches = 0
        # Of the global batch; a tensor, because nothing waits for its number.
        self._total_units = torch.ones(())
        # Of this rank, since the step began, or since the last evaluation was logged.
        self._counts, self._eval_counts = self._nothing(), self._nothing()
        self._penalty = self._zero()
        # Of all ranks, for each step since the last log.
        self._steps: list[tuple[Counts, Tensor]] = []

    # -- one optimizer step

    def begin_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Take in all of this rank's micro-batches of the coming step. Collective.

        The penalty is divided by the units of the whole global batch, so that the sum over
        micro-batches and ranks does not depend on how the batch was split.
        """
        self._micro_batches = len(micro_batches)
        total = self._zero()
        for batch in micro_batches:
            total += self._units_of(batch).to(self._device) * len(self.routers.layers)
        sum_over_ranks(total)
        self._total_units = total.clamp(min=1.0).float()
        self._counts, self._penalty = self._nothing(), self._zero()

    @contextlib.contextmanager
    def forward(self, inputs: Mapping[str, Any], *, trains: bool) -> Iterator[None]:
        """Hold a context for one forward pass of the model on `inputs`.

        In evaluations decisions are those of the asked capacity. While training the frozen layers
        are in evaluation mode, too: no dropout.
        """
        masks = describe_inputs(inputs, prompt_tokens=self.routers.config.prompt_tokens)
        self.routers.set_batch(masks.token_mask, masks.prompt_mask, masks.segment_ids)
        if trains:
            for layer in find_decoder(self.model).layers:
                is_checkpointed = bool(getattr(layer, "gradient_checkpointing", False))
                set_layer_checkpointing(layer.eval(), is_checkpointed)
            yield
            return
        with self.routers.steering.budget.settled():
            yield
        self._eval_counts = self._eval_counts + self.routers.counts()

    def add_penalty(self, loss: Tensor, *, replicas: int, scaled: bool) -> Tensor:
        """Return the loss of the forward pass with the capacity penalty on top.

        The trainer averages gradients over `replicas` processes and, unless the loss is `scaled`
        already, over micro-batches; the penalties of all of them are meant to be summed.
        """
        if not self._micro_batches:
            raise RuntimeError("no step was begun: route_tune needs Trainer.get_batch_samples")
        if self.routers.config.budget == "global":
            penalty = self.routers.penalty(self._total_units)
        else:
            penalty = self.routers.penalty() / (self._micro_batches * replicas)
        if not penalty.requires_grad and self.routers.config.budget != "static":
            raise ConfigError(
                "the trainer's last forward pass of this batch was without gradient, so routers "
                "cannot learn from it: leave out label_smoothing_factor and compute_loss_func"
            )
        self._counts = self._counts + self.routers.counts()
        self._penalty += penalty.detach().to(self._device)
        factor = replicas * (1 if scaled else self._micro_batches)
        return loss + factor * penalty.to(loss.device)

    def end_step(self, progress: float) -> None:
        """Steer towards the asked capacity, by what the global batch did. Collective.

        `progress` is the share of the run that is done.
        """
        if not self._micro_batches:
            raise RuntimeError("no loss had a penalty in this step: call route_tune(trainer)")
        packed = torch.cat([self._counts.pack(), self._penalty.reshape(1)])
        sum_over_ranks(packed)
        counts = Counts.unpack(packed[:-1])
        self.routers.steer(Measured.of(counts), progress=progress)
        self._steps.append((counts, packed[-1]))
        self._micro_batches = 0

    # -- numbers for the log

    def take_step_numbers(self) -> dict[str, float]:
        """Return capacity and mean penalty of the steps since the last call; empty without any."""
        steps, self._steps = self._steps, []
        if not steps:
            return {}
        kept = sum((counts for counts, _ in steps), self._nothing())
        penalty = sum(float(penalty) for _, penalty in steps) / len(steps)
        return {"capacity": kept.capacity(), "loss_penalty": penalty}

    def take_eval_numbers(self) -> dict[str, float]:
        """Return the capacity of the evaluations since the last call, over all ranks; empty without
        any. Collective."""
        packed = self._eval_counts.pack()
        sum_over_ranks(packed)
        self._eval_counts = self._nothing()
        counts = Counts.unpack(packed)
        return {"eval_capacity": counts.capacity()} if float(counts.units.sum()) else {}

    # -- files

    def save(self, folder: Path) -> None:
        """Write the routers, and what steering remembers, into `folder`/routers."""
        path = save_routers(folder / ROUTERS, self.routers, base=self.base)
        content = json.dumps(self.routers.steering.budget.state(), indent=2) + "\n"
        (path / _STEERING).write_text(content, encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote; raises CheckpointError when it is missing or damaged."""
        path = folder / ROUTERS
        fill_routers(path, self.routers)
        self.routers.steering.budget.restore(read_json(path / _STEERING))

    # -- helpers

    @property
    def _device(self) -> torch.device:
        return next(self.routers.parameters()).device

    def _nothing(self) -> Counts:
        return Counts.zeros(len(self.routers.layers), device=self._device)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._device)

    def _units_of(self, inputs: Mapping[str, Any]) -> Tensor:
        masks = describe_inputs(inputs, prompt_tokens=self.routers.config.prompt_tokens)
        pooling = self.routers.pooling(masks.token_mask, masks.prompt_mask, masks.segment_ids)
        return pooling.unit_mask.sum()


def checkpointing_of(args: Any) -> tuple[bool, Mapping[str, Any]]:
    """Return (whether a trainer's arguments ask for activation checkpointing, its options)."""
    # transformers 5.23 renamed gradient_checkpointing; both names have the value there.
    is_active = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    options = getattr(args, "activation_checkpointing_kwargs", None)
    return bool(is_active), options or args.gradient_checkpointing_kwargs or {}
