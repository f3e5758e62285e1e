"""Thresholds of trained routers for any capacity: found on calibration text, checked on text held
out."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megaskip.calibration.allocation import UnreachedError, allocate
from megaskip.calibration.equal_scores import give_directions
from megaskip.calibration.expert_load import ExpertLoad
from megaskip.calibration.finite import require_finite
from megaskip.calibration.threshold import TOLERANCE, calibrate_threshold
from megaskip.checkpoint.adapters import adapter_config
from megaskip.checkpoint.routers import fill_routers, read_router_config
from megaskip.config import RouterConfig, RunConfig, Threshold
from megaskip.data import Batch
from megaskip.log import get_logger
from megaskip.parallel.build import build_engine
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.results import EvalResult
from megaskip.parallel.topology import Topology
from megaskip.routing import RouterSet

logger = get_logger(__name__)

_SEARCH_ROUNDS = 8
"""Tries of a threshold; the search stops earlier when it is close enough."""

Batches = Sequence[Batch | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedCapacity:
    """One calibrated capacity, and what it comes to on other text."""

    capacity: float
    """The one that was asked for."""
    threshold: Threshold
    described: str
    """The threshold as text."""
    kept: float
    """Share of the calibration text's units that ran at the threshold."""
    held_out: float
    """Share of the held-out text's units that ran at the threshold."""
    held_out_error: float
    """Standard error of `held_out` over rows."""
    loss: float
    """Held out, nats a supervised token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """What came of the capacities that were asked for."""

    points: tuple[CalibratedCapacity, ...]
    """Those that the routers realise, in ascending order."""
    problems: tuple[str, ...] = ()
    """For each of the others: what was found, what was expected and what to change."""
    equal_logits: Mapping[int, float] = field(default_factory=dict)
    """By layer, for routers that had given every unit the same logit, that logit: to reach a
    capacity they were given a direction."""
    weights: Mapping[str, Tensor] | None = None
    """All routers' then, as a state dict."""
    loads: Mapping[float, ExpertLoad] = field(default_factory=dict)
    """By capacity, the load of experts on the held-out text; empty where none are skipped, or it
    was not measured."""
    dense_loss: float = math.nan
    """Held out, nats a supervised token, of the model with everything running; not a number where
    it was not measured."""

    def require_all(self) -> None:
        """Raise UnreachedError with all problems, if there are any."""
        if self.problems:
            raise UnreachedError(*self.problems)


def routed_engine(
    config: RunConfig, topology: Topology, source: ModelSource, routers: Path
) -> Engine:
    """Return an engine with the routers of a router folder on the model of `source`. Collective."""
    stored, layers, _ = read_router_config(routers)
    # Its own threshold is where every search begins, all layers alike; capacity_low matters to
    # training alone.
    alike = stored.threshold if isinstance(stored.threshold, float) else 0.5
    stored = dataclasses.replace(stored, layers=layers, capacity_low=None, threshold=alike)
    config = dataclasses.replace(config, router=stored, adapter=adapter_config(routers))
    engine = build_engine(config, topology, source, read_ds_config(config.parallel.ds_config))
    fill_routers(routers, engine.routers)
    return engine


def calibrate_all(
    engine: Engine,
    calibration: Batches,
    held_out: Batches,
    capacities: Sequence[float],
    *,
    rounds: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> CalibrationResult:
    """Return the thresholds of `capacities`: one for all layers or, after some `rounds` of
    `allocate`, one of each. Collective.

    Each is found on `calibration` and checked on `held_out`; one that the routers cannot realise on
    either text is a problem of the result. Routers that have learnt nothing get a direction where
    that is needed. `progress` is called once a capacity and once a round.
    """
    alike, points, problems = engine.routers.config, [], []
    equal_logits: dict[int, float] = {}
    near: RouterConfig | None = None
    for capacity in sorted(capacities, reverse=True):
        engine.routers.configure(alike)
        kept, equal = reach_capacity(engine, calibration, capacity, rounds=_SEARCH_ROUNDS)
        equal_logits |= equal
        progress()
        if rounds and _is_near(kept, capacity):
            kept = allocate(
                engine, calibration, capacity, rounds=rounds, near=near, progress=progress
            )
            near = engine.routers.config
        if not _is_near(kept, capacity):
            problems.append(_not_reached(capacity, kept))
            continue
        measured = engine.evaluate(held_out, routed=True)
        require_finite(measured.loss, f"the held-out loss at capacity {capacity:g}")
        off = abs(measured.capacity - capacity)
        if off > TOLERANCE + 2 * measured.capacity_error:
            problems.append(_does_not_hold(capacity, kept, measured))
            continue
        points.append(_calibrated(engine.routers, capacity, kept, measured))
        logger.info("capacity %g: keeps %.4f of held-out text", capacity, measured.capacity)
    return CalibrationResult(
        points=tuple(reversed(points)),
        problems=tuple(problems),
        equal_logits=equal_logits,
        weights=engine.routers.state_dict() if equal_logits else None,
    )


def reach_capacity(
    engine: Engine, batches: Batches, capacity: float, *, rounds: int
) -> tuple[float, dict[int, float]]:
    """Put the threshold where `batches` keep `capacity`, and give a direction to routers that have
    learnt nothing where it is not reached without; return (what they keep, see give_directions).
    Collective."""
    before, logits = engine.routers.config, {}
    kept = calibrate_threshold(engine, batches, capacity=capacity, rounds=rounds)
    if not _is_near(kept, capacity):
        logits = give_directions(engine.routers)
    if logits:
        engine.routers.configure(before)
        kept = calibrate_threshold(engine, batches, capacity=capacity, rounds=rounds)
    return kept, logits


def with_points(config: RouterConfig, points: Sequence[CalibratedCapacity]) -> RouterConfig:
    """Return the configuration with these thresholds in its table; others of it stay."""
    table = dict(config.calibrated) | {point.capacity: point.threshold for point in points}
    return dataclasses.replace(config, calibrated=tuple(table.items()))


def _is_near(kept: float, capacity: float) -> bool:
    return abs(kept - capacity) <= TOLERANCE


def _not_reached(capacity: float, kept: float) -> str:
    return (
        f"--capacity {capacity:g} cannot be reached: the nearest that these routers keep of "
        f"the calibration text is {kept:.3f}, because it has too few different rows. "
        "Calibrate on more text (--rows, --data)"
    )


def _does_not_hold(capacity: float, kept: float, measured: EvalResult) -> str:
    return (
        f"--capacity {capacity:g} does not hold on other text: calibrated to {kept:.3f}, held "
        f"out it is {measured.capacity:.3f} (standard error {measured.capacity_error:.3f}). "
        "Calibrate on more text (--rows), or on text like that which the model will read "
        "(--data)"
    )


def _calibrated(
    routers: RouterSet, capacity: float, kept: float, measured: EvalResult
) -> CalibratedCapacity:
    """Return the thresholds that the routers have now, with what they came to."""
    settled = routers.settled_config()
    return CalibratedCapacity(
        capacity=capacity,
        threshold=settled.threshold,
        described=settled.describe_threshold(),
        kept=kept,
        held_out=measured.capacity,
        held_out_error=measured.capacity_error,
        loss=measured.loss,
    )
