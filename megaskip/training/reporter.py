"""What a run says and leaves in its folder: metrics, progress bar, closing table, report.json,
warnings. Knows numbers, not where they come from; only the first rank writes."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from megaskip.checkpoint.atomic import write_errors, write_json
from megaskip.config import RunConfig
from megaskip.log import get_logger
from megaskip.parallel.results import StepResult
from megaskip.parallel.topology import Topology
from megaskip.progress import ProgressBatches, progress_bar
from megaskip.reporting.metrics import FILE, MetricsWriter
from megaskip.reporting.summary import closing_rows, human_bytes, peak_memory_gib, table, versions
from megaskip.reporting.trackers import Tracker, open_trackers
from megaskip.training.early_stop import CAPACITY_TOLERANCE

logger = get_logger(__name__)

T = TypeVar("T")

_WINDOW = 20
"""Steps at the end over which the capacity of training is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """What is known when a run is over, beside its metrics."""

    step: int
    tokens: int
    """Real tokens seen in training."""
    held_out: Mapping[str, Any]
    """The numbers of Trainer.evaluate; empty when nothing is held out."""
    calibrated: float | None
    """Capacity of the calibration rows; None when nothing was calibrated."""
    early_stop: Mapping[str, Any] | None = None
    """What EarlyStop.describe says; None without --early_stop."""
    trained_bytes: int
    """What trains and its optimizer state, on a rank."""
    trained_parameters: int
    compensation_parameters: int = 0
    """Of them, those of compensations."""
    peak_memory_gib: float
    """The most of all ranks."""
    written: Mapping[str, Path]
    """What the run is kept for, by what the path holds."""


class RunReporter:
    """Reports one run. Every rank has one; those after the first are silent."""

    def __init__(
        self,
        *,
        config: RunConfig,
        topology: Topology,
        output_dir: Path,
        layers: Sequence[int],
        total_steps: int,
    ) -> None:
        """`layers` are the routed ones; none with --train full."""
        self.output_dir = output_dir
        self._config = config
        self._topology = topology
        self._layers = tuple(layers)
        self._total_steps = total_steps
        self._started = 0.0
        self._metrics: MetricsWriter | None = None
        self._bar: Any = None
        self._trackers: dict[str, Tracker] = {}

    def start_trackers(self, first_step: int) -> None:
        """Open what --report_to names for a run that has taken `first_step` steps, before `open`.
        First rank only; raises MegaskipError."""
        names, config = self._config.log.trackers, dataclasses.asdict(self._config)
        self._trackers = open_trackers(names, self.output_dir, config, first_step=first_step)

    @contextlib.contextmanager
    def open(self, first_step: int) -> Iterator[None]:
        """Hold the files and the bar of a run open, which has taken `first_step` steps so far."""
        self._started = time.monotonic()
        if not self._topology.is_first:
            yield
            return
        log = self._config.log
        with write_errors(self.output_dir):
            metrics = MetricsWriter(
                self.output_dir, self._layers, first_step=first_step, trackers=self._trackers
            )
        bar = progress_bar(
            desc="training",
            total=self._total_steps,
            initial=first_step,
            unit="step",
            disable=None if log.progress else True,
            mininterval=0.5,
        )
        with metrics as self._metrics, bar as self._bar:
            yield
        self._metrics = None

    def record(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        seconds: float,
        scores: Mapping[int, Tensor],
    ) -> None:
        """Write the numbers of one step, which took `seconds`, and the distribution of each layer's
        `scores`."""
        if self._metrics is None:
            return
        values = {
            "loss_task": result.loss_task,
            "loss_penalty": result.loss_penalty,
            "capacity": result.capacity,
            "capacity_per_layer": list(result.capacity_per_layer),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self._topology.device),
            "supervised_fraction": result.supervised_fraction,
        }
        with write_errors(self.output_dir):
            self._metrics.record(step, values)
            self._metrics.histograms(step, scores)
        shown = {"loss": f"{result.loss_task:.3f}", "tok/s": f"{result.tokens / seconds:.0f}"}
        if self._layers:
            shown["capacity"] = f"{result.capacity:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def held_out(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Say what an evaluation in the middle of a run measured."""
        if self._metrics is not None:
            scalars = {name: v for name, v in numbers.items() if isinstance(v, float)}
            text = ", ".join(f"{name} {value:.4f}" for name, value in scalars.items())
            tqdm.write(f"step {step}: held out {text}")
            with write_errors(self.output_dir):
                self._metrics.held_out(step, scalars)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the numbers of all evaluations so far, with their `step`. First rank only, inside
        `open`."""
        assert self._metrics is not None
        return self._metrics.evaluations

    def progress(self, batches: Sequence[T], desc: str) -> ProgressBatches[T]:
        """Return `batches` with a bar for a pass over them, on the first rank's terminal."""
        is_shown = self._topology.is_first and self._config.log.progress
        return ProgressBatches(batches, desc, disable=None if is_shown else True)

    def close(self, end: RunEnd) -> dict[str, Any]:
        """Write report.json and say how the run went; return the report. First rank only."""
        report = self._report(end)
        write_json(self.output_dir / "report.json", report)
        rows = closing_rows(report)
        if "routers" in end.written:
            is_static = self._config.router.budget == "static"
            command = "export-static" if is_static else "convert"
            export = f"megaskip {command} --run {self.output_dir} --output exported --verify"
            rows.append(("next", export))
        for line in table(rows, title=f"done: {self.output_dir}"):
            logger.info("%s", line)
        if self._layers and self._config.router.budget == "global":
            for warning in capacity_warnings(report):
                logger.warning("%s", warning)
        return report

    def _report(self, end: RunEnd) -> dict[str, Any]:
        assert self._metrics is not None, "the first rank closes a run inside open()"
        written = {"metrics": self.output_dir / FILE, **end.written}
        with write_errors(self.output_dir):
            picture = self._metrics.heatmap(end.step)
        if picture is not None:
            written["picture"] = picture
        window = self._metrics.history[-_WINDOW:]
        return {
            "steps": end.step,
            "tokens": end.tokens,
            "seconds": time.monotonic() - self._started,
            "held_out": dict(end.held_out),
            "asked_capacity": self._config.router.capacity,
            "training_capacity": sum(entry["capacity"] for entry in window) / max(len(window), 1),
            "window": len(window),
            "calibrated_capacity": end.calibrated,
            "early_stop": None if end.early_stop is None else dict(end.early_stop),
            "optimizer": _optimizer_text(end.trained_bytes, end.trained_parameters),
            "compensation": self._compensation(end.compensation_parameters),
            "peak_memory_gib": end.peak_memory_gib,
            "written": {name: str(path) for name, path in written.items()},
            "config": dataclasses.asdict(self._config),
            "versions": versions(),
        }

    def _compensation(self, count: int) -> dict[str, Any] | None:
        """Return what the report says of compensations; None where there are none."""
        router = self._config.router
        if not count:
            return None
        ranked = {"rank": router.compensation_rank} if router.compensation == "low_rank" else {}
        sizes = {"layers": len(self._layers), "parameters": count, "bytes": 4 * count}
        return {"kind": router.compensation, **ranked, **sizes}


def _optimizer_text(size: int, count: int) -> str:
    return (
        f"{human_bytes(size)} ({size / count:.0f} bytes for each of {count:,} trained parameters, "
        "master weights included)"
    )


def capacity_warnings(report: Mapping[str, Any]) -> list[str]:
    """Return what to warn of when a run missed the asked capacity by more than the held-out sample
    can hide. `report` is the content of report.json."""
    held_out, asked = report["held_out"], report["asked_capacity"]
    advice = "train longer (--max_steps), or on more varied data"
    if held_out:
        error = held_out["capacity"] - asked
        if abs(error) <= CAPACITY_TOLERANCE + 2 * held_out["capacity_standard_error"]:
            return []
        return [f"the capacity is off by {error:+.3f}: {advice}"]
    warnings = ["nothing is held out: what skipping costs was not measured"]
    calibrated = report["calibrated_capacity"]
    if calibrated is not None and abs(calibrated - asked) > CAPACITY_TOLERANCE:
        warnings.append(f"the capacity is {calibrated:.3f}, asked was {asked:.3f}: {advice}")
    return warnings
