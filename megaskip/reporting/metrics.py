"""metrics.jsonl of a run, and what trackers get of it. Written by the first rank only."""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from megaskip.checkpoint.atomic import write_errors, write_text
from megaskip.extras import extra
from megaskip.log import get_logger
from megaskip.reporting.trackers import Tracker

with extra("train"):
    from megaskip.reporting.heatmap import capacity_heatmap

FILE = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""Of held-out evaluations in the middle of a run; there is none where there were none."""

logger = get_logger(__name__)


class MetricsWriter:
    """Appends one JSON object a step and mirrors it to trackers."""

    def __init__(
        self,
        output_dir: Path,
        layers: Sequence[int],
        *,
        first_step: int,
        trackers: Mapping[str, Tracker],
    ) -> None:
        """`trackers` are closed with this writer."""
        self._layers = tuple(layers)
        self._path = output_dir / FILE
        self._history = _truncate(self._path, first_step)
        self._evaluations = _truncate(output_dir / EVALUATIONS, first_step)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._trackers = dict(trackers)
        self._heatmap = output_dir / "capacity.png"

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for close in (self._file.close, lambda: self._tell(lambda tracker: tracker.close())):
            # Closing writes what could not be written before: the first error is the one to say.
            with write_errors(self._path) if error is None else contextlib.suppress(OSError):
                close()

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
        scalars = {
            _TAGS.get(name, name): value
            for name, value in values.items()
            if not isinstance(value, (list, tuple))
        }
        shares = zip(self._layers, values["capacity_per_layer"], strict=True)
        scalars |= {f"capacity_per_layer/{layer:03d}": share for layer, share in shares}
        self._tell(lambda tracker: tracker.scalars(step, scalars))

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the records of all evaluations so far, those before a resume included."""
        return self._evaluations

    def held_out(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write what an evaluation measured."""
        self._evaluations.append({"step": step, **numbers})
        with open(self._path.with_name(EVALUATIONS), "a", encoding="utf-8") as file:
            file.write(json.dumps(self._evaluations[-1]) + "\n")
        scalars = {f"held_out/{name}": value for name, value in numbers.items()}
        self._tell(lambda tracker: tracker.scalars(step, scalars))

    def histograms(self, step: int, scores: Mapping[int, Tensor]) -> None:
        """Write the distribution of each layer's scores (sigmoids of the logits)."""
        if not self._trackers:
            return
        for layer, values in scores.items():
            name, numbers = f"scores/{layer:03d}", values.float().cpu().numpy()
            self._tell(functools.partial(_histogram, step, name, numbers))

    def heatmap(self, step: int) -> Path | None:
        """Draw capacity by layer and step, as a PNG in the run folder and for the trackers."""
        if not self._layers or not self._history:
            return None
        shares = np.array([entry["capacity_per_layer"] for entry in self._history]).T
        steps = [entry["step"] for entry in self._history]
        image = capacity_heatmap(shares, self._layers, steps, self._heatmap)
        self._tell(lambda tracker: tracker.image(step, "capacity/layer_by_step", image))
        return self._heatmap

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        """Do this with every tracker; one that fails is given up, and that is said."""
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except tracker.errors as error:
                del self._trackers[name]
                logger.warning(
                    "--report_to %s: it failed (%s) and gets no more numbers of this run; "
                    "metrics.jsonl has all of them",
                    name,
                    error,
                )


def _histogram(step: int, name: str, values: np.ndarray[Any, Any], tracker: Tracker) -> None:
    tracker.histogram(step, name, values)


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
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            if number < len(lines):  # a killed run leaves half a line, and nothing after it
                logger.warning("%s, line %d is damaged: it is removed", path, number)
            continue
        if step <= first_step:
            kept.append(entry)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept
