"""How much of an asked capacity each layer gets: more where skipping costs more, as measured.

Training holds all layers level, so that each learns which of its units matter. Whether one layer
matters more than another is measured afterwards, on calibration text.
"""

from collections.abc import Callable, Sequence

from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import CALIBRATED, Engine, quantile
from megaskip.parallel.results import EvalResult
from megaskip.routing import RouterSet, ThresholdSearch, Worth

_TRIES = 6
TOLERANCE = 0.01
"""How far a capacity may be from the asked one."""


def allocate(
    engine: Engine,
    batches: Sequence[Batch | None],
    capacity: float,
    *,
    rounds: int,
    progress: Callable[[], object] = lambda: None,
) -> float:
    """Give each routed layer its own threshold, so that `batches` of all ranks lose least when
    they keep `capacity`; returns what they keep. Collective.

    The thresholds that the routers have now are where it begins, and what it returns to when
    nothing found has a lower loss. A round costs R + 1 forward passes and those of a search.
    Raises ConfigError for decisions per token: their costs are not measured one by one.
    """
    routers = engine.routers
    assert routers is not None
    if routers.config.unit == "token":
        raise ConfigError(
            "layers get their own thresholds for decisions per sequence, not for "
            f"{routers.config.granularity}: calibrate without --allocate"
        )
    routers.configure(routers.settled_config())
    best, kept = routers.config, engine.evaluate(batches, routed=True)
    for _ in range(rounds):
        found = _round(engine, routers, batches, capacity)
        if abs(found.capacity - capacity) <= TOLERANCE and found.loss < kept.loss:
            best, kept = routers.config, found
        progress()
    routers.configure(best)
    return kept.capacity


def _round(
    engine: Engine, routers: RouterSet, batches: Sequence[Batch | None], capacity: float
) -> EvalResult:
    """Place thresholds by what skipping costs beside the present decisions; returns what they
    do."""
    logits, costs = engine.skip_costs(batches)
    worth, search = Worth.fit(logits, costs), ThresholdSearch(capacity)
    price = quantile(worth.of(logits).flatten(), 1 - capacity)
    for _ in range(_TRIES):
        found = _at(engine, routers, batches, worth, price)
        search.note(price, found.capacity)
        if search.distance <= CALIBRATED:
            return found
        price = search.next(price)
    return _at(engine, routers, batches, worth, search.best)


def _at(
    engine: Engine,
    routers: RouterSet,
    batches: Sequence[Batch | None],
    worth: Worth,
    price: float,
) -> EvalResult:
    routers.place(worth.thresholds(price))
    return engine.evaluate(batches, routed=True)
