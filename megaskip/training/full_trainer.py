"""--train full: what a run trains, measures and keeps when every weight trains. Makes small
backbones; knows no routers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from megaskip.checkpoint.atomic import new_folder
from megaskip.checkpoint.run_tokenizer import given_tokenizer
from megaskip.config import RunConfig
from megaskip.parallel.full_engine import FullEngine
from megaskip.training.loop import Trainer


@dataclass(kw_only=True)
class FullTrainer(Trainer):
    """Trains every weight of a small model."""

    engine: FullEngine

    def evaluate(self) -> dict[str, Any]:
        """Return the held-out loss. Collective."""
        held_out = self.loader.held_out()
        if not held_out:
            return {}
        batches = self.reporter.progress(held_out, "held out")
        return {"loss": self.engine.evaluate(batches, check=self.stop_if_asked)}


class ModelWeights:
    """The trained model as files: those of a Hugging Face folder."""

    def __init__(self, model: Any, config: RunConfig, folder: Path) -> None:
        """`folder` is where the untrained model came from, and its tokenizer."""
        self._model = model
        self._config = config
        self._folder = folder

    def stored_as(self, name: str) -> tuple[str, str]:
        """Return (file in a checkpoint folder, name of the tensor in it) of a parameter."""
        return "model.safetensors", name

    def write(self, folder: Path) -> None:
        """Write the model and the tokenizer of the run into a folder."""
        model, data = self._config.model, self._config.data
        transformers_logging.disable_progress_bar()  # of one shard, again at every checkpoint
        self._model.save_pretrained(folder, max_shard_size="1TB")
        tokenizer = given_tokenizer(
            model.tokenizer or self._folder,
            data.chat_template,
            trust_remote_code=model.trust_remote_code,
        )
        tokenizer.save_pretrained(folder)

    def require_same(self, checkpoint: Path) -> None:
        """Do nothing: that the model is the same is known from what a checkpoint says of it."""

    def steering(self) -> dict[str, float]:
        """Return nothing: no capacity is steered."""
        return {}

    def steer_from(self, state: Mapping[str, float], checkpoint: Path) -> None:
        """Do nothing: no capacity is steered."""

    def save_result(self, output_dir: Path) -> dict[str, Path]:
        """Write the trained model's folder, in the place of an older one."""
        with new_folder(output_dir / "model") as folder:
            self.write(folder)
        return {"model": output_dir / "model"}

    def describe(self) -> list[tuple[str, str]]:
        """Return what trains."""
        count = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        return [("trains", f"every weight, {count:,} parameters")]
