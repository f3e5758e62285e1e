"""metrics.jsonl and TensorBoard of a run. Written by the first rank only."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from megaskip.checkpoint.atomic import write_errors, write_text
from megaskip.extras import extra
from megaskip.log import get_logger

with extra("train"):
    from torch.utils.tensorboard import SummaryWriter

    from megaskip.reporting.heatmap import capacity_heatmap

FILE = "metrics.jsonl"

logger = get_logger(__name__)


class MetricsWriter:
    """Appends one JSON object a step and mirrors it to TensorBoard."""

    def __init__(
        self, output_dir: Path, layers: Sequence[int], *, first_step: int, tensorboard: bool
    ) -> None:
        self._layers = tuple(layers)
        self._path = output_dir / FILE
        self._history = _truncate(self._path, first_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._board = (
            SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
            if tensorboard
            else None
        )
        self._heatmap = output_dir / "capacity.png"

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._file, self._board):
            # Closing writes what could not be written before: the first error is the one to say.
            with write_errors(self._path) if error is None else contextlib.suppress(OSError):
                if file is not None:
                    file.close()

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the records of all steps so far, those before a resume included."""
        return self._history

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one step's numbers; `capacity_per_layer` is a list in the order of the routed
        layers."""
        entry = {"step": step, **values}
        self._history.append(entry)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in values.items():
            if not isinstance(value, (list, tuple)):
                self._board.add_scalar(_TAGS.get(name, name), value, step)
        shares = values["capacity_per_layer"]
        for layer, share in zip(self._layers, shares, strict=True):
            self._board.add_scalar(f"capacity_per_layer/{layer:03d}", share, step)

    def histograms(self, step: int, scores: Mapping[int, Tensor]) -> None:
        """Write the distribution of each layer's scores (sigmoids of the logits)."""
        if self._board is not None:
            for layer, values in scores.items():
                self._board.add_histogram(f"scores/{layer:03d}", values.float().cpu().numpy(), step)

    def heatmap(self, step: int) -> Path | None:
        """Draw capacity by layer and step, as a PNG in the run folder and in TensorBoard."""
        if not self._layers or not self._history:
            return None
        shares = np.array([entry["capacity_per_layer"] for entry in self._history]).T
        steps = [entry["step"] for entry in self._history]
        image = capacity_heatmap(shares, self._layers, steps, self._heatmap)
        if self._board is not None:
            self._board.add_image("capacity/layer_by_step", image, step, dataformats="HWC")
        return self._heatmap


_TAGS = {
    "loss_task": "loss/task",
    "loss_penalty": "loss/penalty",
    "capacity": "capacity/mean",
    "capacity_error": "capacity/error",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "tokens_per_second": "speed/tokens_per_second",
    "peak_memory_gib": "memory/peak_gib",
    "supervised_fraction": "data/supervised_fraction",
}


def _truncate(path: Path, first_step: int) -> list[dict[str, Any]]:
    """Keep the records up to `first_step`: steps taken after the checkpoint are taken again."""
    if not path.is_file():
        return []
    kept = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, LookupError, TypeError, RecursionError):
            if number < len(lines):  # a killed run leaves half a line, and nothing after it
                logger.warning("%s, line %d is damaged: it is removed", path, number)
            continue
        if step <= first_step:
            kept.append(entry)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
