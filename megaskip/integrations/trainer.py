"""route_tune: a transformers Trainer, or a subclass such as TRL's SFTTrainer, that trains routers.

The class of the trainer instance is exchanged for a subclass of it, so that the trainer's own loss,
data, logging and schedule stay what they are.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.arch import attach_routers
from megaskip.checkpoint.base import BaseModel, describe_base
from megaskip.config import RouterConfig
from megaskip.errors import ConfigError
from megaskip.integrations.tuning import RouterTuning, checkpointing_of
from megaskip.routing import PREFIX, RouterSet


def route_tune(
    trainer: Any, config: RouterConfig | None = None, *, calibration_rows: int = 4096
) -> RouterSet:
    """Make `trainer` train routers on its frozen model instead of the model; return the routers.

    Call it after the trainer is made and before `trainer.train()`. `config` says what is routed;
    leave it out for a model that has routers already. From then on each step describes its batch to
    the routers, adds the capacity penalty to the loss, and steers towards the asked capacity;
    `capacity`, `loss_penalty` and `eval_capacity` are logged. Checkpoints hold the routers alone.
    After the last step the threshold is put where `calibration_rows` training rows keep the asked
    capacity (0 leaves it), and the routers are written to `output_dir`/routers.

    Works in one process and in data-parallel ones. Raises ConfigError for settings that cannot
    work: sharded models, adapters, mixed precision, an optimizer that was made without the routers.
    """
    problems = _problems(trainer, config, calibration_rows)
    if problems:
        raise ConfigError(*problems)
    from megaskip.integrations.callback import RouterTuningCallback

    registered = dict(trainer.model.named_children()).get(PREFIX)
    routers = attach_routers(trainer.model, config) if registered is None else registered
    trained = routers.trained_parameters()
    for name, parameter in routers.named_parameters():
        parameter.requires_grad_(name in trained)
    tuning = RouterTuning(trainer.model, routers, _base_of(trainer.model))
    base: type = type(trainer)
    trainer.__class__ = routed_class(base)
    trainer._skip_tuning = tuning
    trainer.add_callback(RouterTuningCallback(trainer, tuning, calibration_rows=calibration_rows))
    return routers


class RoutedTrainer:
    """What route_tune puts in front of a trainer's class."""

    _skip_tuning: RouterTuning

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of the coming optimizer step, as the trainer's class does."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._skip_tuning.begin_step(samples)
        return samples, num_items

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of the trainer's class, with the capacity penalty while training."""
        trainer: Any = self
        tuning, trains = self._skip_tuning, bool(model.training)
        with tuning.forward(inputs, trains=trains):
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not trains:
            return result
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                trainer.compute_loss_func is not None
            )
        loss: Tensor = result[0] if return_outputs else result
        loss = tuning.add_penalty(loss, replicas=trainer.args.world_size, scaled=scaled)
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what the trainer's class does, and the capacity."""
        if "loss" in logs:
            logs |= self._skip_tuning.take_step_numbers()
        if any(name.startswith("eval_") for name in logs):
            logs |= self._skip_tuning.take_eval_numbers()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the routers, the tokenizer and the trainer's arguments; the base stays where it
        is."""
        trainer: Any = self
        if not trainer.args.should_save:
            return
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._skip_tuning.save(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)
        torch.save(trainer.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Take over the routers of a checkpoint."""
        self._skip_tuning.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Take over the routers of the best checkpoint."""
        trainer: Any = self
        self._skip_tuning.load(Path(trainer.state.best_model_checkpoint))


@functools.cache
def routed_class(base: type) -> type:
    """Return the subclass of a trainer's class that trains routers; one for each class."""
    return type(f"Routed{base.__name__}", (RoutedTrainer, base), {"__module__": base.__module__})


def _problems(trainer: Any, config: RouterConfig | None, calibration_rows: int) -> list[str]:
    """Return what cannot work: found, expected, what to change."""
    args, model = trainer.args, trainer.model
    has_routers = PREFIX in dict(model.named_children())
    problems = []
    if isinstance(trainer, RoutedTrainer):
        problems.append("this trainer trains routers already; call route_tune once")
    if config is not None and has_routers:
        problems.append("the model has routers already; leave config out, or detach_routers first")
    if config is None and not has_routers:
        problems.append("the model has no routers; give a RouterConfig")
    if calibration_rows < 0:
        problems.append(f"calibration_rows is {calibration_rows}; expected 0 or more")
    if getattr(model, "peft_config", None):
        problems.append("the model has PEFT adapters; routers train on the frozen model alone")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        problems.append(
            "the trainer shards the model (DeepSpeed or FSDP), which routers in its loop do not "
            "support: use megaskip train, which trains them under ZeRO-3 and in stages"
        )
    if args.n_gpu > 1:
        problems.append(
            f"the trainer would copy the model to {args.n_gpu} GPUs of one process "
            "(nn.DataParallel); start one process for each with torchrun"
        )
    if args.bf16 or args.fp16:
        problems.append(
            f"the trainer's {'bf16' if args.bf16 else 'fp16'}=True computes in mixed precision, "
            "routers included; set it to False and load the frozen model in bfloat16 instead "
            "(dtype)"
        )
    if checkpointing_of(args)[1].get("use_reentrant"):
        problems.append(
            "activation_checkpointing_kwargs has use_reentrant=True, which loses the gradient of "
            "the penalty; set it to False"
        )
    if trainer.optimizer is not None and not has_routers:
        problems.append(
            "the trainer has an optimizer that was made without routers: call attach_routers first "
            "and give the optimizer routers.parameters()"
        )
    return problems


def _base_of(model: Any) -> BaseModel:
    """Return the identity of the model, by the folder or hub id that it was loaded from."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    folder = Path(name) if name and Path(name).is_dir() else None
    return describe_base(model.config, folder, name=name or None)
