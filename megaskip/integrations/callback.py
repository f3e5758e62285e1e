"""The callback of transformers' Trainer that steers and calibrates routers.

In a file of its own: transformers' callbacks import accelerate, which sets environment variables;
it is imported when there is a trainer.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.integrations.calibration import calibrate_on
from megaskip.integrations.tuning import RouterTuning, checkpointing_of
from megaskip.log import get_logger

logger = get_logger(__name__)


class RouterTuningCallback(TrainerCallback):
    """Steers the capacity after each optimizer step, and calibrates it after the last one.

    route_tune adds it to a trainer; by itself it cannot add the penalty to the loss.
    """

    def __init__(self, trainer: Any, tuning: RouterTuning, *, calibration_rows: int) -> None:
        self._trainer, self._tuning, self._calibration_rows = trainer, tuning, calibration_rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checkpoint the layers that have a backward pass and no others, where activation
        checkpointing is on; every_n_layers of its options is left as it is."""
        is_active, options = checkpointing_of(args)
        if is_active and "every_n_layers" not in options:
            checkpoint_activations(self._tuning.model, self._tuning.routers.layers[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steer. Collective."""
        self._tuning.end_step(state.global_step / state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the threshold where training rows keep the asked capacity, and write the routers.
        Collective."""
        routers, tuning = self._tuning.routers, self._tuning
        if routers.config.budget == "global" and self._calibration_rows:
            kept = calibrate_on(self._trainer, tuning.model, routers, self._calibration_rows)
            threshold = routers.settled_config().describe_threshold()
            logger.info("calibrated on training data: capacity %.4f at %s", kept, threshold)
        if args.should_save:
            tuning.save(Path(args.output_dir))
