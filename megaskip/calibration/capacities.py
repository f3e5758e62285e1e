"""Thresholds of trained routers for any capacity: found on calibration text, checked on text held
out."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaskip.calibration.allocation import TOLERANCE, UnreachedError, allocate
from megaskip.calibration.threshold import calibrate_threshold
from megaskip.checkpoint.routers import load_router_tensors, read_router_config
from megaskip.config import RouterConfig, RunConfig, Threshold
from megaskip.data import Batch
from megaskip.parallel.build import build_engine
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.topology import Topology

_ROUNDS = 8

Batches = Sequence[Batch | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One calibrated capacity, and what it comes to on other text."""

    capacity: float
    threshold: Threshold
    described: str
    """The threshold as text."""
    kept: float
    """Of the calibration text."""
    held_out: float
    held_out_error: float
    """Standard error of `held_out`: these are only so many rows."""
    loss: float
    """Held out, nats a supervised token."""


class MissedError(UnreachedError):
    """Some of several capacities cannot be realised; `points` are the others."""

    def __init__(self, points: list[Point], *problems: str) -> None:
        super().__init__(*problems)
        self.points = points


def routed_engine(config: RunConfig, topology: Topology, folder: Path, routers: Path) -> Engine:
    """Return an engine with the routers of a router folder on the model in `folder`. Collective."""
    stored, layers, _ = read_router_config(routers)
    # Its own threshold is where every search begins, all layers alike; capacity_low matters to
    # training alone.
    alike = stored.threshold if isinstance(stored.threshold, float) else 0.5
    stored = dataclasses.replace(stored, layers=layers, capacity_low=None, threshold=alike)
    config = dataclasses.replace(config, router=stored)
    engine = build_engine(config, topology, folder, read_ds_config(config))
    assert engine.routers is not None
    engine.routers.load_state_dict(load_router_tensors(routers, engine.routers))
    return engine


def calibrate_all(
    engine: Engine,
    calibration: Batches,
    held_out: Batches,
    capacities: Sequence[float],
    *,
    rounds: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> list[Point]:
    """Return the thresholds of `capacities`, ascending: one for all layers or, after some `rounds`
    of `allocate`, one of each; `progress` is called once a capacity and once a round. Collective.

    Raises MissedError, once all are done, for those that the routers cannot realise, on either
    text.
    """
    assert engine.routers is not None
    level, points = engine.routers.config, []
    problems: list[str] = []
    near: RouterConfig | None = None
    for capacity in sorted(capacities, reverse=True):
        engine.routers.configure(level)
        kept = calibrate_threshold(engine, calibration, capacity=capacity, rounds=_ROUNDS)
        progress()
        if rounds and _is_near(kept, capacity):
            kept = allocate(
                engine, calibration, capacity, rounds=rounds, near=near, progress=progress
            )
            near = engine.routers.config
        try:
            points.append(_checked(engine, held_out, capacity, kept))
        except UnreachedError as error:
            problems += error.problems
    if problems:
        raise MissedError(points[::-1], *problems)
    return points[::-1]


def with_points(config: RouterConfig, points: Sequence[Point]) -> RouterConfig:
    """Return the configuration with these thresholds in its table; others of it stay."""
    table = dict(config.calibrated) | {point.capacity: point.threshold for point in points}
    return dataclasses.replace(config, calibrated=tuple(table.items()))


def _is_near(kept: float, capacity: float) -> bool:
    return abs(kept - capacity) <= TOLERANCE


def _checked(engine: Engine, held_out: Batches, capacity: float, kept: float) -> Point:
    """Return the point of the thresholds that the routers have now, which kept so much."""
    if not _is_near(kept, capacity):
        raise UnreachedError(
            f"--capacity {capacity:g} cannot be reached: the nearest that these routers keep of "
            f"the calibration text is {kept:.3f}, because too many of their scores are equal. "
            "Train them longer, or choose another capacity"
        )
    found = engine.evaluate(held_out, routed=True)
    off = abs(found.capacity - capacity)
    if off > TOLERANCE + 2 * found.capacity_error:
        raise UnreachedError(
            f"--capacity {capacity:g} does not hold on other text: calibrated to {kept:.3f}, held "
            f"out it is {found.capacity:.3f} (standard error {found.capacity_error:.3f}). "
            "Calibrate on more text (--rows), or on text like that which the model will read "
            "(--data)"
        )
    assert engine.routers is not None
    settled = engine.routers.settled_config()
    return Point(
        capacity=capacity,
        threshold=settled.threshold,
        described=settled.describe_threshold(),
        kept=kept,
        held_out=found.capacity,
        held_out_error=found.capacity_error,
        loss=found.loss,
    )
