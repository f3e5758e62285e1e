"""The job of `megaskip compare`: train what is missing, measure, write and print."""

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megaskip._version import __version__
from megaskip.calibration.allocation import UnreachedError
from megaskip.checkpoint.base import BaseModel
from megaskip.config import DataConfig, ModelConfig, OptimConfig, RouterConfig, RunConfig
from megaskip.config.commands.compare import CompareOptions
from megaskip.data.demo import with_demo
from megaskip.errors import ConfigError
from megaskip.log import get_logger, quiet_libraries, set_up_logging
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.topology import Topology, alone, process_group, read_topology
from megaskip.study.comparison import Comparison
from megaskip.study.cost_routers import BY_COST, CostRouters
from megaskip.study.ledger import Job, Ledger, share_of
from megaskip.study.measured import Measured
from megaskip.study.over_seeds import contrasts
from megaskip.study.pareto import Point, table_rows
from megaskip.study.recipes import train_missing, train_seconds, training_of
from megaskip.study.report import ComparisonReport
from megaskip.study.static_drops import STATIC, StaticDrops

logger = get_logger(__name__)

_ALLOCATION_ROUNDS = 2
_REPORT_SECONDS = 60.0
_DENSE = "dense"
_DRAWN = ("random", *BY_COST)
"""Methods that have a seed, and no training."""
_MEASURED_WITH = (
    *("granularity", "layers", "calibration_rows", "compensation_rank", "order_rows", "cost_rows"),
    *("continuations", "prefill_runs"),
)
"""Options on which a measurement depends, beside the model, the text and its run."""


def compare(options: CompareOptions) -> None:
    """Train, measure, write and print. Ranks of a launcher share out the work by files in the
    output folder, each with a model of its own; the first one reports."""
    launched = read_topology(os.environ)
    set_up_logging(rank=launched.rank)
    quiet_libraries()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {error.strerror}; name a folder") from None
    topology = alone(launched)
    config = _run_config(options)
    source = with_checked_weights(resolve_source(config.model), topology)
    with process_group(topology, timeout=600):
        comparison = _open(config, topology, source, options)
        bench = _Bench(comparison, source.describe(), options)
        jobs = _jobs(comparison, options)
        mine = share_of(jobs, launched.rank, launched.world_size)
        gpu = launched.local_rank if launched.world_size > 1 else None
        bench.train(mine, gpu if launched.device.type == "cuda" else None)
        reported = time.monotonic()
        for job in tqdm(mine, desc="measuring", disable=None if launched.is_first else True):
            if bench.ledger.read(job) is None:
                bench.ledger.write(job, bench.measure(job))
            # Also in between: a comparison takes hours.
            if launched.is_first and time.monotonic() - reported > _REPORT_SECONDS:
                _report_so_far(bench, jobs, job)
                reported = time.monotonic()
        if launched.is_first:
            bench.ledger.wait(jobs)
            report = bench.report(jobs)
            report.write()
            report.show()


def _run_config(options: CompareOptions) -> RunConfig:
    """Return what the comparison loads and reads."""
    data = DataConfig(
        data=options.data,
        eval_data=options.eval_data,
        held_out=options.documents,
        seq_length=options.seq_length,
        cache_dir=options.cache_dir,
    )
    return RunConfig(
        model=ModelConfig(model=options.model, dtype="float32"),
        router=RouterConfig(granularity=options.granularity, layers=options.layers),
        data=with_demo(data),
        optim=OptimConfig(calibration_rows=options.calibration_rows),
    )


def _open(
    config: RunConfig, topology: Topology, source: ModelSource, options: CompareOptions
) -> Comparison:
    """Return the comparison with all that is to be measured; raises ConfigError for a skip that
    cannot be reached."""
    comparison = Comparison(config, topology, source, prefill_runs=options.prefill_runs)
    for skip in options.shares:
        comparison.share(skip)
    if options.blimp:
        comparison.add_pairs(options.blimp, options.pairs)
    if options.choice:
        comparison.add_choices(options.choice, options.choice_questions)
    if options.continuations:
        comparison.add_continuations(options.continuations)
    return comparison


def _jobs(comparison: Comparison, options: CompareOptions) -> list[Job]:
    """Return all measurements, the dense model first."""
    jobs = [Job(method=_DENSE, skip=0.0, seed=None, training=None)]
    for method in options.methods:
        for skip in options.shares:
            for seed in options.seeds:
                training = training_of(method, skip, seed, comparison, options)
                if training is None and method not in _DRAWN:
                    jobs.append(Job(method=method, skip=skip, seed=None, training=None))
                    break  # without anything that has a seed
                if training is None or training.is_done or not options.no_training:
                    jobs.append(Job(method=method, skip=skip, seed=seed, training=training))
    return jobs


def _report_so_far(bench: "_Bench", jobs: Sequence[Job], last: Job) -> None:
    """Write what is measured so far, and log the point of the last job."""
    report = bench.report(jobs)
    report.write()
    points = [p for p in report.points if (p.method, p.asked) == (last.method, last.skip)]
    for row in table_rows(points):
        logger.info("%s", "  ".join(row))


class _Bench:
    """What does one job after the other, and reports what is there."""

    def __init__(self, comparison: Comparison, base: BaseModel, options: CompareOptions) -> None:
        self._comparison, self._base, self._options = comparison, base, options
        self._drops = StaticDrops(
            comparison,
            most=max(options.shares),
            rank=options.compensation_rank,
            order_rows=options.order_rows,
        )
        self._cost_routers = CostRouters(
            comparison,
            base,
            options.output / "fitted",
            rank=options.compensation_rank,
            rows=options.cost_rows,
            shares=options.shares,
        )
        settings = {name: getattr(options, name) for name in _MEASURED_WITH}
        settings |= {"version": __version__, "text": comparison.fingerprint()}
        self.ledger = Ledger(options.output / "measured", settings | {"base": base.to_json()})

    def train(self, jobs: Sequence[Job], gpu: int | None) -> None:
        """Train what `jobs` need and is not there."""
        if self._options.no_training:
            return
        needed = {job.training.folder: job for job in jobs if job.training is not None}
        for job in needed.values():
            training = job.training
            assert training is not None
            if training.start is not None and not training.is_done:
                self._drops.write_start(job.method, job.skip, training.start, self._base)
        trainings = [job.training for job in needed.values() if job.training is not None]
        with tqdm(total=len(trainings), desc="training", disable=None) as bar:
            train_missing(trainings, self._options, gpu=gpu, progress=bar.update)

    def measure(self, job: Job) -> Measured | str:
        """Return what is measured of a job, or why its run cannot reach the skip."""
        comparison = self._comparison
        if job.method == _DENSE:
            return comparison.measure(comparison.everything)
        if job.method in STATIC:
            if job.training is None:
                return comparison.measure(self._drops.policy(job.method, job.skip))
            return comparison.measure(self._drops.take(job.training.folder / "routers"))
        if job.method in BY_COST:
            return self._measure_routed(job, self._cost_routers.run(job.method, job.seed or 0))
        if job.training is None:
            self._drops.put(with_maps=False)
            (order,) = comparison.orders([job.seed or 0])[job.method]
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
        (dense,) = measured.pop((_DENSE, 0.0))
        points = [self._comparison.point(_DENSE, 0.0, [dense], dense)]
        points += [self._point(key, of, dense, runs.get(key, [])) for key, of in measured.items()]
        return ComparisonReport(
            options=self._options,
            points=points,
            contrasts=contrasts(measured, self._options.ours),
            left_out=left_out,
        )

    def _point(
        self,
        key: tuple[str, float],
        measured: Sequence[Measured],
        dense: Measured,
        runs: Sequence[Path],
    ) -> Point:
        seconds = statistics.mean(map(train_seconds, runs)) if runs else None
        return self._comparison.point(*key, measured, dense, train_seconds=seconds)
