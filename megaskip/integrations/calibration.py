"""Forward passes of a trainer's model on its own training rows, for the calibration."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megaskip.arch import find_decoder
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.integrations.batches import describe_inputs
from megaskip.routing import RouterSet, RoutingDecision

Inputs = Mapping[str, Any]
_READ = ("input_ids", "attention_mask", "position_ids")


def calibrate_on(trainer: Any, model: Any, routers: RouterSet, rows: int) -> float:
    """Put the threshold where about `rows` training rows of all ranks keep the asked capacity;
    return what they keep. Collective."""
    loader, was_training = trainer.get_train_dataloader(), model.training
    size = trainer.args.train_batch_size * trainer.args.world_size
    batches = [
        {name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
        for batch in itertools.islice(loader, -(-rows // size))
    ]
    passes = TrainerForwards(model, routers, trainer.args.world_size)
    model.eval()
    try:
        return calibrate_threshold(passes, batches)
    finally:
        model.train(was_training)


class TrainerForwards:
    """The forward passes that calibrate_threshold asks for, by a model that is whole on each
    rank."""

    def __init__(self, model: Any, routers: RouterSet, world_size: int) -> None:
        self.routers, self.world_size = routers, world_size
        self._model = model

    def forwards(
        self, batches: Sequence[Inputs | None], check: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Inputs | None, Tensor]]:
        """Yield each batch right after its forward pass; losses are not computed."""
        nothing = torch.zeros(())
        for batch in batches:
            check()
            if batch is not None:
                self._run(batch)
            yield batch, nothing

    def own_decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions."""
        return self.routers.decisions()

    def _run(self, batch: Inputs) -> None:
        moved = {name: value.to(self._model.device) for name, value in batch.items()}
        masks = describe_inputs(moved, prompt_tokens=self.routers.config.prompt_tokens)
        self.routers.set_batch(masks.token_mask, masks.prompt_mask, masks.segment_ids)
        read = {name: moved[name] for name in _READ if name in moved}
        find_decoder(self._model).decoder(**read, use_cache=False)
