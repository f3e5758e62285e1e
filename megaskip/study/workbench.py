"""What a comparison trains, measures and reports, one job after the other. Knows methods, not
command lines."""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaskip._version import __version__
from megaskip.calibration.allocation import UnreachedError
from megaskip.checkpoint.atomic import write_json
from megaskip.config import DataConfig, RunConfig
from megaskip.config.cli import parse_run_config
from megaskip.config.commands.compare import DENSE_LORA, FITTED_BASELINES, CompareOptions
from megaskip.data import TokenizedData
from megaskip.data.loader import DataLoader
from megaskip.errors import CheckpointError
from megaskip.log import get_logger
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology
from megaskip.progress import progress_bar
from megaskip.study.comparison import Comparison
from megaskip.study.cost_routers import BY_COST, CostRouters
from megaskip.study.earlier_runs import (
    START,
    has_start,
    require_as_asked,
    require_base,
    start_settings,
)
from megaskip.study.ledger import Job, Ledger
from megaskip.study.measured import Measured
from megaskip.study.over_seeds import contrasts
from megaskip.study.pareto import Point
from megaskip.study.recipes import Training, train_flags, train_missing, train_seconds
from megaskip.study.report import ComparisonReport
from megaskip.study.static_drops import STATIC, StaticDrops
from megaskip.study.training_costs import CONTROL, COST, cost_of, count_flops, over_control
from megaskip.training.data import make_loader, read_data
from megaskip.training.initial_routers import with_initial_routers

logger = get_logger(__name__)

_ALLOCATION_ROUNDS = 2
DENSE = "dense"
_MEASURED_WITH = (
    *("granularity", "layers", "calibration_rows", "compensation_rank", "order_rows", "cost_rows"),
    *("cost_groups", "continuations", "prefill_runs"),
)
"""Options on which a measurement depends, beside the model, the text and its run."""


class Workbench:
    """What does one job after the other, and reports what is there."""

    def __init__(
        self,
        comparison: Comparison,
        source: ModelSource,
        topology: Topology,
        options: CompareOptions,
    ) -> None:
        """`source` is the model of the comparison, `topology` this process alone."""
        self._comparison, self._source, self._topology = comparison, source, topology
        self._base, self._options = source.describe(), options
        self._drops = StaticDrops(
            comparison,
            most=max(options.shares),
            rank=options.compensation_rank,
            order_rows=options.order_rows,
            cost_file=options.output / "fitted" / "cost.json",
        )
        self._data: dict[DataConfig, tuple[TokenizedData, int]] = {}
        settings = {name: getattr(options, name) for name in _MEASURED_WITH}
        settings |= {"version": __version__, "text": comparison.fingerprint()}
        self.ledger = Ledger(options.output / "measured", settings | {"base": self._base.to_json()})
        self._cost_routers = CostRouters(
            comparison,
            self._base,
            options.output / "fitted" / self.ledger.key,
            rank=options.compensation_rank,
            groups=options.cost_groups,
        )

    # -- trainings

    def train(self, jobs: Sequence[Job], gpu: int | None) -> None:
        """Train what `jobs` need and is not there, and count what that takes; runs in processes of
        their own see the GPU `gpu` alone, or all. Raises ConfigError for a run that is there with
        other settings, CheckpointError for one of another model."""
        needed = {job.training.folder: (job, job.training) for job in jobs if job.training}
        for _, training in needed.values():
            require_base(training, self._base)
        if self._options.no_training:
            return
        for _, training in needed.values():
            asked = parse_run_config(train_flags(self._options, training))
            require_as_asked(training.folder, asked)
        missing = [
            (job, training)
            for job, training in needed.values()
            if training.start is not None and not has_start(training, self._start_settings(job))
        ]
        for job, training in missing:
            self._write_start(job, training)
        trainings = [training for _, training in needed.values()]
        with progress_bar(total=len(trainings), desc="training") as bar:
            train_missing(trainings, self._options, gpu=gpu, progress=bar.update)
        for training in trainings:
            if not (training.folder / COST).is_file():
                write_json(training.folder / COST, self._cost_of(training))

    def _start_settings(self, job: Job) -> dict[str, Any]:
        return start_settings(job.method, self._options, self._base)

    def _write_start(self, job: Job, training: Training) -> None:
        """Write the routers that a run starts from, in the place of older ones."""
        assert training.start is not None
        shutil.rmtree(training.start, ignore_errors=True)
        if job.method in BY_COST:
            seed = job.seed or 0
            self._cost_routers.write_start(job.method, job.skip, seed, training.start)
        else:
            self._drops.write_start(job.method, job.skip, training.start, self._base)
        write_json(training.start / START, self._start_settings(job))

    def _cost_of(self, training: Training) -> dict[str, int]:
        """Return FLOPs and parameters of a run: of its first step, times their number."""
        flags = train_flags(self._options, training)
        config = with_initial_routers(parse_run_config(flags))
        self._comparison.attach(config.router, run=config)
        engine = self._comparison.engine_of(config)
        batches = next(self._loader(config).steps(0))
        flops = count_flops(lambda: engine.train_step(batches, 0.0, 0.0))
        parameters = sum(parameter.numel() for parameter in engine.parameters.values())
        return {"flops": flops * self._options.steps, "parameters": parameters}

    def _loader(self, config: RunConfig) -> DataLoader:
        """Return the loader of a run of `megaskip train`."""
        if config.data not in self._data:
            self._data[config.data] = read_data(config, self._source)
        return make_loader(config, self._topology, *self._data[config.data], None)

    # -- measurements

    def measure(self, job: Job) -> Measured | str:
        """Return what is measured of a job, or why its run cannot reach the skip."""
        comparison = self._comparison
        if job.method == DENSE:
            self._drops.put(with_maps=False)
            return comparison.measure(comparison.everything)
        if job.method in (CONTROL, DENSE_LORA) and job.training is not None:
            comparison.attach(comparison.plain, job.training.folder / "routers")
            return comparison.measure(comparison.everything)
        if job.method in STATIC:
            if job.training is None:
                return comparison.measure(self._drops.policy(job.method, job.skip))
            return comparison.measure(self._drops.take(job.training.folder / "routers"))
        if job.method in BY_COST and job.training is None:
            return self._measure_routed(job, self._cost_routers.run(job.method, job.seed or 0))
        if job.training is None:
            plain = FITTED_BASELINES.get(job.method, job.method)
            self._drops.put(with_maps=plain != job.method)
            (order,) = comparison.orders([job.seed or 0])[plain]
            return comparison.measure(comparison.policy(order, job.skip))
        return self._measure_routed(job, job.training.folder)

    def _measure_routed(self, job: Job, run: Path) -> Measured | str:
        comparison, options = self._comparison, self._options
        rounds = _ALLOCATION_ROUNDS if job.method == "allocated" else 0
        try:
            kept = comparison.take(run / "routers", job.skip, rounds=rounds)
        except UnreachedError as error:
            why = f"{job.method} at {100 * job.skip:g} %, {run.name}: {error}"
            logger.warning("left out: %s", why)
            return why
        logger.info("%s: capacity %.4f for %.4f", run.name, kept, 1 - comparison.share(job.skip))
        measured = comparison.measure(None)
        drawn_skip = options.shares[len(options.shares) // 2]
        if (job.method, job.skip, job.seed) == (options.ours, drawn_skip, options.seeds[0]):
            title = f"{job.method}, {job.skip:.1%} of all {comparison.skips} skipped"
            picture = comparison.picture(title)
            picture.write_png(options.output / "token_map.png")
            picture.write_html(options.output / "token_map.html")
        return measured

    def report(self, jobs: Sequence[Job]) -> ComparisonReport:
        """Return the report of what is measured so far; the dense model is."""
        measured: dict[tuple[str, float], list[Measured]] = {}
        runs: dict[tuple[str, float], list[Path]] = {}
        left_out = []
        for job in jobs:
            key, outcome = (job.method, job.skip), self.ledger.read(job)
            if isinstance(outcome, str):
                left_out.append(outcome)
            elif outcome is not None:
                measured.setdefault(key, []).append(outcome)
                if job.training is not None:
                    runs.setdefault(key, []).append(job.training.folder)
        if (DENSE, 0.0) not in measured:
            raise CheckpointError(
                f"{self._options.output}: the dense model is no longer measured there; another "
                "comparison writes into the same folder: give each its own --output"
            )
        (dense,) = measured.pop((DENSE, 0.0))
        points = [self._comparison.point(DENSE, 0.0, [dense], dense)]
        points += [self._point(key, of, dense, runs.get(key, [])) for key, of in measured.items()]
        costs = [
            cost_of(method, skip, runs.get((method, skip), []), self._fit_cost(method, skip))
            for method, skip in measured
        ]
        return ComparisonReport(
            costs=over_control([cost for cost in costs if cost.seconds is not None]),
            options=self._options,
            points=points,
            contrasts=contrasts(measured, self._options.ours),
            left_out=left_out,
        )

    def _fit_cost(self, method: str, skip: float) -> dict[str, Any] | None:
        """Return what the closed form before a training, or instead of it, took; None for none."""
        if method in BY_COST:
            return self._cost_routers.fit_cost(method, self._options.seeds[0])
        return self._drops.fit_cost(method, skip)

    def _point(
        self,
        key: tuple[str, float],
        measured: Sequence[Measured],
        dense: Measured,
        runs: Sequence[Path],
    ) -> Point:
        seconds = statistics.mean(map(train_seconds, runs)) if runs else None
        return self._comparison.point(*key, measured, dense, train_seconds=seconds)
