"""Compensations in closed form: each routed sublayer's update is regressed on what it reads.

One forward pass over calibration text with everything running, for all layers at once. It is a
start for training, or a result of its own where nothing can be trained.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megaskip.calibration.finite import sum_of_finite
from megaskip.calibration.fit_progress import SAVED_EVERY, FitProgress
from megaskip.calibration.low_rank_fit import LowRankFit
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet

_SKETCHED = 4
"""One in so many batches chooses the features, the others are regressed on them."""
_FIRST, _SECOND = "features", "regression"
_MAPS = "maps"


@torch.no_grad()
def fit_compensation(
    engine: Engine,
    batches: Sequence[Batch | None],
    *,
    check: Callable[[], object] = lambda: None,
    progress: FitProgress | None = None,
) -> dict[int, float]:
    """Fill the compensations of all routed layers from `batches` of all ranks, as many on each.

    Returns by layer which share of the update's variance its map explains on these rows. Every map
    is fitted as if all other layers ran. Reduced-rank ridge regression for "low_rank", the mean
    update for "bias". `check` as in Engine.forwards. With `progress` it goes on from where that
    stands, and keeps it up. Collective.
    Raises ConfigError when the routers have no compensation or there is no text, MegaskipError
    where what a layer reads or returns is not finite.
    """
    routers = engine.routers
    if routers.config.compensation == "none":
        raise ConfigError("there is nothing to fit with compensation none; take low_rank or bias")
    if not batches:
        raise ConfigError("there is no text to fit compensations on; give more --data")
    fits = _Fits(routers, engine.device)
    if progress is not None and _MAPS in progress.results:
        progress.restore_fitted(_maps_of(routers))
        return {int(layer): share for layer, share in progress.results[_MAPS].items()}
    done = 0 if progress is None else fits.go_on(progress)
    first = max(len(batches) // _SKETCHED, 1)
    with routers.disabled(), fits.listening():
        for number, batch in enumerate(batches, start=1):
            if number == first + 1:
                fits.begin_second_phase()
            if number <= done:
                continue
            fits.observe(engine, batch, check)
            if progress is not None and number % SAVED_EVERY == 0:
                fits.keep(progress, number)
        if len(batches) == first:  # one batch for both phases
            fits.begin_second_phase()
            fits.observe(engine, batches[0], check)
    explained = fits.finish()
    if progress is not None:
        progress.keep_result(_MAPS, explained, _maps_of(routers))
    return explained


def _read_by(layer: int) -> str:
    return f"what layer {layer} reads and returns on the text of the fit"


def _maps_of(routers: RouterSet) -> dict[str, Tensor]:
    """Return the parameters of all compensations by name."""
    return {
        f"{layer}.{name}": parameter.data
        for layer in routers.layers
        if (compensation := routers.router(layer).compensation) is not None
        for name, parameter in compensation.named_parameters()
    }


class _Fits:
    """The regressions of all routed layers; those of other pipeline stages see nothing here, and
    get their sums from there."""

    def __init__(self, routers: RouterSet, device: torch.device) -> None:
        config = routers.config
        rank = config.compensation_rank if config.compensation == "low_rank" else 0
        self._routers, self._is_counted = routers, True
        self._by_layer = {
            layer: LowRankFit(routers.hidden_size, rank, seed=layer, device=device)
            for layer in routers.layers
        }

    def observe(self, engine: Engine, batch: Batch | None, check: Callable[[], object]) -> None:
        """Take in the real tokens of a batch, from the gates of the layers that are here."""
        # A batch that counts for nothing still runs, for the other ranks' collectives.
        self._is_counted = batch is not None
        for _ in engine.forwards([batch], check):
            pass

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let the gates tell what they read and return in here."""
        for layer, gate in self._routers.gates.items():
            gate.observe = self._observer(layer)
        try:
            yield
        finally:
            for gate in self._routers.gates.values():
                gate.observe = None

    def keep(self, progress: FitProgress, batches: int) -> None:
        """Add the sums of all ranks up on the first one, and keep them. Collective."""
        progress.keep_sums(_SECOND if self._has_features else _FIRST, batches, self._by_layer)

    def go_on(self, progress: FitProgress) -> int:
        """Take up the sums that were kept; return how many batches are in them. Collective."""
        if progress.stage not in (_FIRST, _SECOND):
            return 0
        if progress.stage == _SECOND:
            for fit in self._by_layer.values():
                fit.skip_first_phase()
        progress.restore_sums(self._by_layer)
        return progress.batches

    @property
    def _has_features(self) -> bool:
        return any(fit.features is not None for fit in self._by_layer.values())

    def begin_second_phase(self) -> None:
        if self._has_features:  # it goes on behind there
            return
        for layer, fit in self._by_layer.items():
            fit.begin_second_phase(sum_of_finite(_read_by(layer)))

    def finish(self) -> dict[int, float]:
        explained = {}
        for layer, fit in self._by_layer.items():
            fitted = fit.solve(sum_of_finite(_read_by(layer)))
            compensation = self._routers.router(layer).compensation
            assert compensation is not None
            for name, parameter in compensation.named_parameters():
                parameter.copy_(getattr(fitted, name))
            explained[layer] = fitted.explained
        return explained

    def _observer(self, layer: int) -> Callable[[Tensor, Tensor], None]:
        def observe(read: Tensor, update: Tensor) -> None:
            pooling = self._routers.state.pooling
            assert pooling is not None, "engines describe every batch"
            if self._is_counted:
                self._by_layer[layer].observe(read[pooling.token_mask], update[pooling.token_mask])

        return observe
