"""The training loop and what surrounds it. Owns the run's order of events, not its arithmetic."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megaskip.calibration.threshold import calibrate_threshold
from megaskip.checkpoint import BaseModel
from megaskip.checkpoint.resume import (
    TrainerState,
    prune,
    read_state,
    require_same_routers,
    require_same_run,
    restore,
    save_checkpoint,
)
from megaskip.checkpoint.routers import WEIGHTS, save_routers, write_router_files
from megaskip.config import OptimConfig, RunConfig
from megaskip.data import Batch
from megaskip.data.loader import DataLoader
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.engine import Engine
from megaskip.parallel.preempt import Preemption
from megaskip.parallel.results import EvalResult, StepResult
from megaskip.parallel.topology import Topology
from megaskip.reporting.metrics import MetricsWriter
from megaskip.reporting.progress import ProgressBatches
from megaskip.reporting.summary import closing_rows, human_bytes, peak_memory_gib, table, versions
from megaskip.routing import PREFIX

logger = get_logger(__name__)

_WINDOW = 20
"""Steps at the end over which the capacity of training is averaged."""
_CLOSE = 0.01
"""How far a run may end from the asked capacity without saying so."""


def learning_rate(optim: OptimConfig, step: int, total: int) -> float:
    """Return the rate of step `step` of `total` (from 0): a linear warm-up, then a cosine."""
    warmup = math.ceil(optim.warmup_ratio * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(kw_only=True)
class Trainer:
    """One run. Every rank makes one and calls `run`."""

    config: RunConfig
    topology: Topology
    engine: Engine
    loader: DataLoader
    base: BaseModel
    output_dir: Path
    total_steps: int
    save_hf: Any = None
    """With --train full: writes the model's HF folder."""
    step: int = 0
    tokens: int = 0
    calibrated: float | None = None
    _preemption: Preemption | None = None

    def run(self) -> dict[str, Any]:
        """Train, evaluate and write; returns the content of report.json. Collective.

        A run that is asked to stop (SIGTERM) saves at the next step border and returns {}.
        """
        started = time.monotonic()
        with self._metrics() as metrics, self._bar() as bar, Preemption() as preemption:
            self._preemption = preemption
            for batches in self.loader.steps(self.step):
                if self.step >= self.total_steps:
                    break
                self._seed()
                result, seconds = self._timed_step(batches)
                self.step, self.tokens = self.step + 1, self.tokens + result.tokens
                self._record(metrics, bar, result, seconds)
                if preemption.requested():
                    self.save()
                    return self._stopped()
                if self.step == self.total_steps:
                    break
                if self._due(self.config.checkpoint.save_every):
                    self.save()
                if self._due(self.config.log.eval_every):
                    with contextlib.suppress(_AskedToStop):  # the next step border stops
                        self._evaluate(metrics)
            try:
                self._calibrate()
                self.save()
                return self._close(metrics, time.monotonic() - started)
            except _AskedToStop:  # what is trained was saved before each of these
                return self._stopped()

    def _stopped(self) -> dict[str, Any]:
        """Say that a run that was asked to stop can go on."""
        logger.info(
            "asked to stop: saved %s, step %d of %d; --resume auto continues",
            self._checkpoint,
            self.step,
            self.total_steps,
        )
        return {}

    # -- steps

    def _timed_step(self, batches: list[Batch]) -> tuple[StepResult, float]:
        begun = time.perf_counter()
        lr = learning_rate(self.config.optim, self.step, self.total_steps)
        progress = (self.step + 1) / self.total_steps
        result = self.engine.train_step(batches, lr, progress)
        if not math.isfinite(result.grad_norm):  # the same on every rank
            raise MegaskipError(
                f"step {self.step + 1}: the gradient is {result.grad_norm} (loss "
                f"{result.loss_task:.4g}); a smaller --lr, float32, or other data. Checkpoints so "
                "far are untouched"
            )
        return result, time.perf_counter() - begun

    def _calibrate(self) -> None:
        """Let the last small error of the capacity be taken out by the threshold."""
        routers = self.engine.routers
        rows = self.config.optim.calibration_rows
        if routers is None or routers.config.budget != "global" or not rows:
            return
        self.save()  # what is trained is safe while this takes its time
        calibration = self._watched(self.loader.calibration(rows), "calibrating, a pass")
        self.calibrated = calibrate_threshold(self.engine, calibration)
        logger.info(
            "calibrated on training data: capacity %.4f at threshold %s",
            self.calibrated,
            routers.settled_config().describe_threshold(),
        )

    def _seed(self) -> None:
        """Make randomness a function of (seed, step, rank), so that nothing of it needs to be
        saved."""
        torch.manual_seed(
            (self.config.optim.seed * 1_000_003 + self.step) * 65_537 + self.topology.rank
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _record(
        self, metrics: MetricsWriter | None, bar: Any, result: StepResult, seconds: float
    ) -> None:
        routers, scores = self.engine.routers, {}
        if routers is not None and self._due(self.config.log.log_every):
            scores = self.engine.scores()
        if metrics is None:
            return
        values = {
            "loss_task": result.loss_task,
            "loss_penalty": result.loss_penalty,
            "capacity": result.capacity,
            "capacity_per_layer": list(result.capacity_per_layer),
            "lr": learning_rate(self.config.optim, self.step - 1, self.total_steps),
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.tokens / seconds,
            "peak_memory_gib": peak_memory_gib(self.topology.device),
            "supervised_fraction": result.supervised_fraction,
        }
        metrics.record(self.step, values)
        metrics.histograms(self.step, scores)
        shown = {"loss": f"{result.loss_task:.3f}", "tok/s": f"{result.tokens / seconds:.0f}"}
        if routers is not None:
            shown["capacity"] = f"{result.capacity:.3f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()

    # -- evaluation

    def evaluate(self) -> dict[str, Any]:
        """Return the held-out numbers: dense and routed, or of the model itself. Collective."""
        batches = self.loader.held_out()
        if not batches:
            return {}
        routers = self.engine.routers
        batches = self._watched(batches, "held out")
        if routers is None:
            return {"loss": self.engine.evaluate(batches, routed=False).loss}
        dense = self.engine.evaluate(batches, routed=False)
        routed: EvalResult = self.engine.evaluate(batches, routed=True)
        return {
            "loss_dense": dense.loss,
            "loss_routed": routed.loss,
            "capacity": routed.capacity,
            "capacity_standard_error": routed.capacity_error,
            "capacity_per_layer": dict(zip(routers.layers, routed.capacity_per_layer, strict=True)),
        }

    def _evaluate(self, metrics: MetricsWriter | None) -> None:
        numbers = self.evaluate()
        if metrics is not None:
            text = ", ".join(f"{k} {v:.4f}" for k, v in numbers.items() if isinstance(v, float))
            tqdm.write(f"step {self.step}: held out {text}")

    # -- writing

    @property
    def _checkpoint(self) -> Path:
        return self.output_dir / f"step_{self.step:06d}"

    def save(self) -> Path:
        """Write a checkpoint of this step. Collective."""
        path = self._checkpoint

        def write() -> Path:
            save_checkpoint(
                path,
                self._state(),
                self._write_weights,
                self.engine.parameters,
                self.engine.optimizer,
            )
            prune(self.output_dir, self.config.checkpoint.keep_last)
            return path

        return on_first_rank(self.topology, write)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint; raises CheckpointError when it does not fit. Collective in
        effect."""
        state = read_state(path)
        require_same_run(path, state, self._state())
        if self.engine.routers is not None:
            require_same_routers(path, self.engine.routers)
        weights, prefix = (
            (WEIGHTS, f"{PREFIX}.")
            if self.engine.routers is not None
            else ("model.safetensors", "")
        )
        restore(
            path,
            weights,
            prefix,
            self.engine.parameters,
            self.engine.optimizer,
            state.optimizer_steps,
        )
        if self.engine.routers is not None:
            self.engine.routers.steering.budget.restore(state.steering)
        self.step, self.tokens = state.step, state.tokens
        logger.info("resumed from %s: step %d of %d", path, self.step, self.total_steps)

    def _state(self) -> TrainerState:
        routers = self.engine.routers
        return TrainerState(
            step=self.step,
            tokens=self.tokens,
            optimizer_steps=float(self.step),
            steering=routers.steering.budget.state() if routers is not None else {},
            global_batch_size=self.loader.global_batch_size,
            seed=self.config.optim.seed,
            data_fingerprint=self.loader.data.fingerprint,
            train=self.config.model.train,
            versions=versions(),
            base_model=self.base.to_json(),
        )

    def _write_weights(self, folder: Path) -> None:
        if self.engine.routers is not None:
            write_router_files(folder, self.engine.routers, self.base)
        else:
            self.save_hf(folder)

    # -- the end

    def _close(self, metrics: MetricsWriter | None, seconds: float) -> dict[str, Any]:
        held_out = self.evaluate()
        peak = torch.tensor(peak_memory_gib(self.topology.device), device=self.topology.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return on_first_rank(
            self.topology, lambda: self._finish(metrics, held_out, seconds, float(peak))
        )

    def _finish(
        self, metrics: MetricsWriter | None, held_out: dict[str, Any], seconds: float, peak: float
    ) -> dict[str, Any]:
        """Write what remains and say how it went; on the first rank."""
        assert metrics is not None
        report = self._report(metrics, held_out, seconds, peak)
        (self.output_dir / "report.json").write_text(
            json.dumps(report, indent=2) + "\n", encoding="utf-8"
        )
        rows = closing_rows(report)
        if self.engine.routers is not None:
            export = f"python tools/convert_to_hf.py --run {self.output_dir} --output exported"
            rows.append(("next", f"{export} --verify"))
        for line in table(rows, title=f"done: {self.output_dir}"):
            logger.info("%s", line)
        self._warn_if_off(report)
        return report

    def _report(
        self, metrics: MetricsWriter, held_out: dict[str, Any], seconds: float, peak: float
    ) -> dict[str, Any]:
        written = {"metrics": self.output_dir / "metrics.jsonl"}
        routers = self.engine.routers
        if routers is not None:
            written["routers"] = save_routers(self.output_dir / "routers", routers, base=self.base)
            heatmap = metrics.heatmap(self.step)
            written |= {"picture": heatmap} if heatmap else {}
        else:
            written["model"] = self.output_dir / "model"
            self.save_hf(self.output_dir / "model")
        window = metrics.history[-_WINDOW:]
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "seconds": seconds,
            "held_out": held_out,
            "asked_capacity": self.config.router.capacity,
            "training_capacity": sum(entry["capacity"] for entry in window) / max(len(window), 1),
            "window": len(window),
            "calibrated_capacity": self.calibrated,
            "optimizer": self.describe_optimizer(),
            "peak_memory_gib": peak,
            "written": {name: str(path) for name, path in written.items()},
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
        }

    def describe_optimizer(self) -> str:
        """Return what the optimizer holds on this rank, measured."""
        parameters = self.engine.parameters.values()
        states = [self.engine.optimizer.state[p] for p in parameters]
        moments = sum(s[k].nbytes for s in states for k in ("exp_avg", "exp_avg_sq"))
        weights, count = sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters)
        return (
            f"{human_bytes(weights + moments)} ({(weights + moments) / count:.0f} bytes for each "
            f"of {count:,} trained parameters, master weights included)"
        )

    def _warn_if_off(self, report: dict[str, Any]) -> None:
        """Say so when the run missed the asked capacity by more than the held-out sample can
        hide."""
        held_out, calibrated = report["held_out"], report["calibrated_capacity"]
        if self.config.router.budget != "global" or self.engine.routers is None:
            return
        if not held_out:
            logger.warning("nothing is held out: what skipping costs was not measured")
            if calibrated is not None and abs(calibrated - report["asked_capacity"]) > _CLOSE:
                logger.warning(
                    "the capacity is %.3f, asked was %.3f: train longer (--max_steps), or on more "
                    "varied data",
                    calibrated,
                    report["asked_capacity"],
                )
            return
        error = held_out["capacity"] - report["asked_capacity"]
        if abs(error) > _CLOSE + 2 * held_out["capacity_standard_error"]:
            logger.warning(
                "the capacity is off by %+.3f: train longer (--max_steps), or on more varied data",
                error,
            )

    def _metrics(self) -> Any:
        if not self.topology.is_first:
            return _Nothing()
        layers = self.engine.routers.layers if self.engine.routers is not None else ()
        return MetricsWriter(
            self.output_dir, layers, first_step=self.step, tensorboard=self.config.log.tensorboard
        )

    def _bar(self) -> Any:
        if not self.topology.is_first:
            return _Nothing()
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not self.config.log.progress,
            mininterval=0.5,
        )

    def _watched(self, batches: Sequence[Batch | None], desc: str) -> ProgressBatches:
        shown = self.topology.is_first and self.config.log.progress
        hidden = None if shown else True  # only a terminal sees it
        return ProgressBatches(batches, desc, disable=hidden, before_each=self._stop_if_asked)

    def _stop_if_asked(self) -> None:
        if self._preemption is not None and self._preemption.requested():
            raise _AskedToStop


class _AskedToStop(Exception):  # noqa: N818  not an error
    """A signal came while batches were passed over; every rank raises it at the same one."""


class _Nothing:
    """Stands for the writers that other ranks do not have."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        return None
