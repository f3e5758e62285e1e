"""Where a run's numbers go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

A library is imported when its tracker is opened, on the first rank, and not before.
"""

import importlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.errors import MegaskipError, first_line
from megaskip.extras import MissingExtraError, extra

IDS = "trackers.json"
"""In the run folder: by tracker, the name under which a run that goes on is found again."""
_PROJECT = "megaskip"
_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}

Array = np.ndarray[Any, Any]


class Tracker(Protocol):
    """Takes the numbers of one run. What it has no place for it leaves out."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Return what its library raises when it cannot record."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        ...

    def histogram(self, step: int, name: str, values: Array) -> None:
        """Record a distribution."""
        ...

    def image(self, step: int, name: str, pixels: Array) -> None:
        """Record a picture, uint8 [H, W, 3]."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def require_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError where the library of a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, _EXTRAS[name], f"--report_to {name}")


def open_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], *, first_step: int
) -> dict[str, Tracker]:
    """Return the trackers of the run in `folder`, which has taken `first_step` steps, by name.

    A run that goes on keeps its identity in each of them. Raises MissingExtraError or, when a
    library refuses, MegaskipError.
    """
    require_trackers(names)
    ids = run_ids(folder, names, is_new=first_step == 0)
    settings = _flat(config)
    opened: dict[str, Tracker] = {}
    for name in names:
        with extra(_EXTRAS[name]):
            importlib.import_module(name)
        if name == "tensorboard":
            opened[name] = TensorBoard(folder, first_step)
        else:
            opened[name] = _KINDS[name](folder, ids[name], settings)
    return opened


class TensorBoard:
    """Events in the run folder; those after a checkpoint that the run goes on from are dropped."""

    errors: tuple[
        type[Exception], ...
    ] = ()  # OSError, which ends a run as for any other of its files

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Array) -> None:
        """Record a distribution."""
        self._board.add_histogram(name, values, step)

    def image(self, step: int, name: str, pixels: Array) -> None:
        """Record a picture."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._board.close()


class Wandb:
    """Offline unless WANDB_MODE says otherwise; `wandb sync` sends the folder."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self.errors = (wandb.errors.Error,)
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                mode=os.environ.get("WANDB_MODE", "offline"),
                config=dict(settings),
            )
        except self.errors as error:
            raise _refused("wandb", error) from None
        # Steps after a checkpoint are taken again, and wandb's own step cannot go back.
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        self._run.log({"step": step, **values})

    def histogram(self, step: int, name: str, values: Array) -> None:
        """Record a distribution."""
        self._run.log({"step": step, name: self._wandb.Histogram(values)})

    def image(self, step: int, name: str, pixels: Array) -> None:
        """Record a picture."""
        self._run.log({"step": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


class MLflow:
    """A database and pictures beside the run folder unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.exceptions import MlflowException

        self.errors = (MlflowException,)
        self._mlflow = mlflow
        beside = folder.absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        # Of a database MLflow puts pictures into the folder that the command runs in.
        self._pictures = None if uri else (beside / "mlartifacts").as_uri()
        uri = uri or f"sqlite:///{beside / 'mlflow.db'}"
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self._run = self._find(run_id) or self._create(run_id, folder)
            # Tags, not parameters: a run that goes on may have others, which parameters forbid.
            tags = [mlflow.entities.RunTag(f"config.{n}", str(v)) for n, v in settings.items()]
            for start in range(0, len(tags), 100):  # the most that one call takes
                self._client.log_batch(self._run, tags=tags[start : start + 100])
        except self.errors as error:
            raise _refused("mlflow", error) from None

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=self._pictures))

    def _find(self, run_id: str) -> str | None:
        """Return MLflow's own name of the run that goes on; None for a new one."""
        runs = self._client.search_runs(
            [self._experiment()], filter_string=f"tags.megaskip_run = '{run_id}'"
        )
        if not runs:
            return None
        self._client.update_run(runs[0].info.run_id, status="RUNNING")
        return str(runs[0].info.run_id)

    def _create(self, run_id: str, folder: Path) -> str:
        tags = {"megaskip_run": run_id}
        run = self._client.create_run(self._experiment(), run_name=folder.name, tags=tags)
        return str(run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(n, float(v), now, step) for n, v in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def histogram(self, step: int, name: str, values: Array) -> None:
        """Do nothing: MLflow has no distributions."""

    def image(self, step: int, name: str, pixels: Array) -> None:
        """Record a picture."""
        self._client.log_image(self._run, pixels, artifact_file=f"{name}.png")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


class Trackio:
    """Local, in trackio's own folder; `trackio show` draws it."""

    errors = (ValueError, RuntimeError)

    def __init__(self, folder: Path, run_id: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        try:
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=run_id,
                resume="allow",
                config=dict(settings),
                embed=False,
            )
        except self.errors as error:
            raise _refused("trackio", error) from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by name."""
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Array) -> None:
        """Record a distribution."""
        self._run.log({name: self._trackio.Histogram(values)}, step=step)

    def image(self, step: int, name: str, pixels: Array) -> None:
        """Record a picture."""
        self._run.log({name: self._trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


_KINDS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def run_ids(folder: Path, names: Sequence[str], *, is_new: bool) -> dict[str, str]:
    """Return the identity of a run in each tracker: that of before, or a new one."""
    file = folder / IDS
    known = {} if is_new or not file.is_file() else read_json(file)
    ids = {n: known.get(n) or f"{folder.name}-{uuid.uuid4().hex[:8]}" for n in names}
    ids.pop("tensorboard", None)
    if ids:
        write_json(file, {**known, **ids})
    return ids


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _refused(name: str, error: Exception) -> MegaskipError:
    return MegaskipError(
        f"--report_to {name}: it does not start ({first_line(error)}); set it up, or leave it out"
    )
