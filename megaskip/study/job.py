"""The job of `megaskip compare`: train what is missing, measure, write and print."""

import statistics
from pathlib import Path

from tqdm import tqdm

from megaskip.calibration.allocation import UnreachedError
from megaskip.config import DataConfig, ModelConfig, OptimConfig, RouterConfig, RunConfig
from megaskip.config.commands.compare import CompareOptions
from megaskip.data.demo import with_demo
from megaskip.errors import ConfigError
from megaskip.log import get_logger, quiet_libraries, set_up_logging
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.topology import process_group, read_topology
from megaskip.study.comparison import Comparison
from megaskip.study.over_seeds import Measured, contrasts
from megaskip.study.pareto import Point, table_rows
from megaskip.study.recipes import train_missing, train_seconds, trainings
from megaskip.study.report import ComparisonReport
from megaskip.study.static_drops import STATIC, StaticDrops

logger = get_logger(__name__)

_ALLOCATION_ROUNDS = 2
Runs = dict[tuple[str, float], list[Path]]
"""Trained runs by method and skip, one for each seed."""


def compare(options: CompareOptions) -> None:
    """Train, measure, write and print."""
    set_up_logging(rank=0)
    quiet_libraries()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {options.output}: {error.strerror}; name a folder") from None
    topology = read_topology({})
    config = _run_config(options)
    source = with_checked_weights(resolve_source(config.model), topology)
    with process_group(topology, timeout=600):
        comparison = Comparison(config, topology, source, prefill_runs=options.prefill_runs)
        for skip in options.shares:
            comparison.share(skip)  # raises for one that cannot be reached
        if options.blimp:
            comparison.add_pairs(options.blimp, options.pairs)
        if options.continuations:
            comparison.add_continuations(options.continuations)
        drops = StaticDrops(
            comparison,
            most=max(options.shares),
            rank=options.compensation_rank,
            order_rows=options.order_rows,
        )
        needed = trainings(comparison, drops, source.describe(), options)
        if not options.no_training:
            everything = [training for of_method in needed.values() for training in of_method]
            with tqdm(total=len(everything), desc="training", disable=None) as bar:
                train_missing(everything, options, progress=bar.update)
        runs: Runs = {
            key: [training.folder for training in of_method if training.is_done]
            for key, of_method in needed.items()
        }
        _measure_all(comparison, drops, runs, options)


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


def _measure_all(
    comparison: Comparison, drops: StaticDrops, runs: Runs, options: CompareOptions
) -> None:
    """Measure every method at every skip, and write the report after each."""
    dense = comparison.measure(comparison.everything)
    orders = comparison.orders(options.seeds)
    points: list[Point] = [comparison.point("dense", 0.0, [dense], dense)]
    measured: dict[tuple[str, float], list[Measured]] = {}
    left_out: list[str] = []

    def report() -> ComparisonReport:
        return ComparisonReport(
            options=options,
            points=points,
            contrasts=contrasts(measured, options.ours),
            left_out=left_out,
        )

    for (method, skip), trained in tqdm(runs.items(), desc="measuring", disable=None):
        if method in STATIC:
            by_seed = _measure_static(comparison, drops, method, skip, trained)
        elif method in orders:
            drops.put(with_maps=False)
            by_seed = [comparison.measure(comparison.policy(o, skip)) for o in orders[method]]
        else:
            by_seed = _measure_trained(comparison, method, skip, trained, left_out, options)
        if by_seed:
            seconds = statistics.mean(map(train_seconds, trained)) if trained else None
            points.append(comparison.point(method, skip, by_seed, dense, train_seconds=seconds))
            measured[method, skip] = by_seed
            logger.info("%s", "  ".join(table_rows(points[-1:])[0]))
            # Again after every point: a comparison takes hours.
            report().write()
    report().show()


def _measure_static(
    comparison: Comparison, drops: StaticDrops, method: str, skip: float, runs: list[Path]
) -> list[Measured]:
    """Return what is lost when layers are dropped for every text: once, or for each run."""
    if STATIC[method][1] != "trained":
        return [comparison.measure(drops.policy(method, skip))]
    return [comparison.measure(drops.take(run / "routers")) for run in runs]


def _measure_trained(
    comparison: Comparison,
    method: str,
    skip: float,
    runs: list[Path],
    left_out: list[str],
    options: CompareOptions,
) -> list[Measured]:
    """Return what each run of a method loses at a skip; those that cannot reach it go to
    `left_out`."""
    measured = []
    drawn_skip = options.shares[len(options.shares) // 2]
    rounds = _ALLOCATION_ROUNDS if method == "allocated" else 0
    for run in runs:
        try:
            kept = comparison.take(run / "routers", skip, rounds=rounds)
        except UnreachedError as error:
            left_out.append(f"{method} at {100 * skip:g} %, {run.name}: {error}")
            logger.warning("left out: %s", left_out[-1])
            continue
        logger.info("%s: capacity %.4f for %.4f", run.name, kept, 1 - comparison.share(skip))
        measured.append(comparison.measure(None))
        if method == options.ours and skip == drawn_skip and run == runs[0]:
            title = f"{method}, {skip:.1%} of all {comparison.skips} skipped"
            picture = comparison.picture(title)
            picture.write_png(options.output / "token_map.png")
            picture.write_html(options.output / "token_map.html")
    return measured
