"""The job of `megaskip compare`: train what is missing, measure, write and print."""

import os
import time
from collections.abc import Sequence

from megaskip.config import DataConfig, ModelConfig, OptimConfig, RouterConfig, RunConfig
from megaskip.config.commands.compare import DENSE_LORA, CompareOptions
from megaskip.data.demo import with_demo
from megaskip.errors import ConfigError
from megaskip.log import get_logger, set_up_logging
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.topology import Topology, alone, process_group, read_topology
from megaskip.progress import progress_bar
from megaskip.study.comparison import Comparison
from megaskip.study.cost_routers import BY_COST
from megaskip.study.ledger import Job, share_of
from megaskip.study.pareto import table_rows
from megaskip.study.recipes import training_of
from megaskip.study.workbench import DENSE, Workbench

logger = get_logger(__name__)

_REPORT_SECONDS = 60.0
_DRAWN = ("random", "random_fitted", *BY_COST)
"""Methods that have a seed, and no training."""


def compare(options: CompareOptions) -> None:
    """Train, measure, write and print. Ranks of a launcher share out the work by files in the
    output folder, each with a model of its own; the first one reports."""
    launched = read_topology(os.environ)
    set_up_logging(rank=launched.rank)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {error.strerror}; name a folder") from None
    topology = alone(launched)
    config = _run_config(options)
    source = with_checked_weights(resolve_source(config.model), topology)
    with process_group(topology, timeout=600):
        comparison = _open(config, topology, source, options)
        bench = Workbench(comparison, source, topology, options)
        jobs = _jobs(comparison, options)
        mine = share_of(jobs, launched.rank, launched.world_size)
        gpu = launched.local_rank if launched.world_size > 1 else None
        bench.train(mine, gpu if launched.device.type == "cuda" else None)
        reported = time.monotonic()
        for job in progress_bar(
            mine, desc="measuring", disable=None if launched.is_first else True
        ):
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
    cannot be reached, and for too little text."""
    comparison = Comparison(
        config,
        topology,
        source,
        prefill_runs=options.prefill_runs,
        cost_rows=options.cost_rows if set(BY_COST) & set(options.methods) else 0,
    )
    for skip in options.shares:
        comparison.share(skip)
    if set(BY_COST) & set(options.methods) and len(comparison.cost_text) < 2:
        raise ConfigError(
            f"--cost_rows {options.cost_rows}: {len(comparison.cost_text)} batch of text is too "
            "little to fit routers on; raise it, or give more --data"
        )
    if options.blimp:
        comparison.add_pairs(options.blimp, options.pairs)
    if options.choice:
        comparison.add_choices(options.choice, options.choice_questions)
    if options.continuations:
        comparison.add_continuations(options.continuations)
    return comparison


def _jobs(comparison: Comparison, options: CompareOptions) -> list[Job]:
    """Return all measurements, the dense model first."""
    jobs = [Job(method=DENSE, skip=0.0, seed=None, training=None)]
    for method in options.methods:
        for skip in [0.0] if method == DENSE_LORA else options.shares:
            for seed in options.seeds:
                training = training_of(method, skip, seed, comparison, options)
                if training is None and method not in _DRAWN:
                    jobs.append(Job(method=method, skip=skip, seed=None, training=None))
                    break  # without anything that has a seed
                if training is None or training.is_done or not options.no_training:
                    jobs.append(Job(method=method, skip=skip, seed=seed, training=training))
    return jobs


def _report_so_far(bench: Workbench, jobs: Sequence[Job], last: Job) -> None:
    """Write what is measured so far, and log the point of the last job."""
    report = bench.report(jobs)
    report.write()
    points = [p for p in report.points if (p.method, p.asked) == (last.method, last.skip)]
    for row in table_rows(points):
        logger.info("%s", "  ".join(row))
