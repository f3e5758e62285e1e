"""The job of `megaskip fit-routers`: maps, then routers, then thresholds, all without training."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.calibration.capacities import (
    CalibratedCapacity,
    CalibrationResult,
    calibrate_all,
    with_points,
)
from megaskip.calibration.cost_regression import LinearCost
from megaskip.calibration.equal_scores import give_directions
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.opened import Opened, opened, topology_of
from megaskip.calibration.router_fit import fit_routers, require_enough, split_off
from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.routers import save_routers
from megaskip.config import RouterConfig, resolve_layers
from megaskip.config.commands.fit_routers import FitRoutersOptions
from megaskip.config.paths import require_new
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.log import set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.engine import Engine
from megaskip.progress import ProgressBatches, progress_bar
from megaskip.reporting.summary import table, versions

REPORT = "fit.json"


@dataclass(frozen=True, kw_only=True)
class FittedRouters:
    """What was fitted and measured."""

    costs: Mapping[int, LinearCost]
    """By routed layer."""
    explained: Mapping[int, float]
    """By routed layer the share of its update's variance that its map explains; empty without
    maps."""
    calibrated: CalibrationResult

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the closing table."""
        dense = self.calibrated.dense_loss
        by_cost = sorted(self.costs, key=lambda layer: self.costs[layer].mean)
        rows = [
            ("layers, the cheapest to skip first", ", ".join(map(str, by_cost))),
            ("held-out loss, dense", f"{dense:.4f}"),
        ]
        for point in self.calibrated.points:
            realised = f"{point.held_out:.4f} held out (standard error {point.held_out_error:.4f})"
            loss = f"loss {point.loss:.4f} ({point.loss - dense:+.4f})"
            rows.append((f"capacity {point.capacity:g}", f"{realised}, {loss}"))
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the content of fit.json."""
        return {
            "costs": {
                str(layer): {"mean": c.mean, "spread": c.spread, "explained": c.explained}
                for layer, c in self.costs.items()
            },
            "maps_explain": {str(layer): share for layer, share in self.explained.items()},
            "held_out": {
                "loss_dense": self.calibrated.dense_loss,
                "points": [
                    {
                        "asked": point.capacity,
                        "capacity": point.held_out,
                        "standard_error": point.held_out_error,
                        "loss": point.loss,
                    }
                    for point in self.calibrated.points
                ],
            },
            "versions": versions(),
        }


def fit_routers_job(options: FitRoutersOptions) -> None:
    """Fit, calibrate, write the router folder and print what was measured. Every rank calls it.

    Raises UnreachedError, after that, for capacities that the routers do not keep.
    """
    base = options.base
    topology = topology_of(base)
    set_up_logging(rank=topology.rank)
    require_new(options.output)
    recompute = options.activation_checkpointing
    with opened(
        base,
        lambda depth: _router_config(options, depth),
        topology,
        activation_checkpointing=recompute,
    ) as job:
        settings = {n: v for n, v in dataclasses.asdict(options).items() if n != "output"}
        progress = job.progress(options.output, settings)
        fitted = _fit(job, options, progress)
        on_first_rank(topology, lambda: _write(options.output, job, fitted, options.capacity))
        progress.remove()
    if topology.is_first:
        rows = [*fitted.rows(), *_next(options)]
        print("\n".join(table(rows, title=f"routers fitted: {options.output}")))
    fitted.calibrated.require_all()


def _next(options: FitRoutersOptions) -> Iterator[tuple[str, str]]:
    folder = options.output
    yield "next", f"megaskip convert --routers {folder} --output exported --verify"
    if options.compensation != "none":
        train = f"megaskip train --init_routers {folder} --freeze_routers --distill 0.5"
        yield "or first train the maps", f"{train} --capacity {options.capacity[0]:g} ..."


def _router_config(options: FitRoutersOptions, depth: int) -> RouterConfig:
    if options.layers == "all" and depth < 2:
        raise ConfigError(
            "--layers all are all but the first, and the model has one layer; name it with "
            "--layers 0-0 (--granularity mlp_token), or take a deeper model"
        )
    spec = f"1-{depth - 1}," if options.layers == "all" else options.layers
    return RouterConfig(
        granularity=options.granularity,
        router="affine",
        layers=resolve_layers(spec, depth),
        capacity=options.capacity[0],
        compensation=options.compensation,
        compensation_rank=options.compensation_rank,
    )


def _fit(job: Opened, options: FitRoutersOptions, progress: FitProgress) -> FittedRouters:
    """Fit maps and routers, and find the thresholds; go on from where `progress` stands.
    Collective."""
    engine, hidden = job.engine, None if job.topology.is_first else True
    text = job.loader.calibration(options.rows + options.cost_rows)
    cost_rows, rows = split_off(text, options.cost_rows / (options.rows + options.cost_rows))
    require_enough(engine, cost_rows)
    explained: dict[int, float] = {}
    if options.compensation != "none":
        maps = ProgressBatches(rows, "maps", disable=hidden)
        explained = fit_compensation(engine, maps, progress=progress)
    costs = fit_routers(
        engine,
        ProgressBatches(cost_rows, "costs", disable=hidden),
        groups=options.groups,
        distill=options.distill,
        seed=options.base.seed,
        progress=progress,
    )
    held_out = ProgressBatches(job.loader.held_out(), "held out", disable=hidden)
    calibrated = dataclasses.replace(
        _thresholds(engine, rows, held_out, options.capacity, progress, hidden=hidden),
        dense_loss=engine.evaluate(held_out, routed=False).loss,
    )
    return FittedRouters(costs=costs, explained=explained, calibrated=calibrated)


def _thresholds(
    engine: Engine,
    rows: Sequence[Batch | None],
    held_out: Sequence[Batch | None],
    capacities: Sequence[float],
    progress: FitProgress,
    *,
    hidden: bool | None,
) -> CalibrationResult:
    """Return the thresholds of all capacities, each kept in `progress` once it is found.
    Collective."""
    alike, points, problems = engine.routers.config, [], []
    passes = ProgressBatches(rows, "a pass", disable=hidden)
    for capacity in progress_bar(
        sorted(set(capacities), reverse=True), desc="calibrating", disable=hidden
    ):
        step = f"capacity {capacity}"
        if step not in progress.results:
            engine.routers.configure(alike)
            result = calibrate_all(engine, passes, held_out, [capacity])
            progress.keep_result(step, _to_json(result))
        elif progress.results[step]["directions"]:
            give_directions(engine.routers)
        points += [_point(content) for content in progress.results[step]["points"]]
        problems += progress.results[step]["problems"]
    return CalibrationResult(points=tuple(reversed(points)), problems=tuple(problems))


def _to_json(result: CalibrationResult) -> dict[str, Any]:
    return {
        "points": [dataclasses.asdict(point) for point in result.points],
        "problems": list(result.problems),
        "directions": bool(result.equal_logits),
    }


def _point(content: Mapping[str, Any]) -> CalibratedCapacity:
    given = content["threshold"]
    threshold = given if isinstance(given, float) else tuple(given)
    return CalibratedCapacity(**{**content, "threshold": threshold})


def _write(output: Path, job: Opened, fitted: FittedRouters, asked: Sequence[float]) -> None:
    routers = job.engine.routers
    config = with_points(routers.config, fitted.calibrated.points)
    if config.calibrated:  # the first that was asked for and is kept, in force
        kept = [point.capacity for point in fitted.calibrated.points]
        asked = [capacity for capacity in asked if capacity in kept]
        config = config.at_capacity(asked[0])
    routers.configure(config)
    save_routers(output, routers, base=job.source.describe())
    write_json(output / REPORT, fitted.to_json())
