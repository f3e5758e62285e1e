"""Which layers go for every text, and what stands in their places: chosen, fitted and measured."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megaskip.calibration.drop_order import Dropped, greedy_drop_order
from megaskip.calibration.finite import require_finite
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.fit_progress import FitProgress
from megaskip.calibration.similarity import mean_similarity
from megaskip.config import RouterConfig, resolve_layers
from megaskip.config.commands.fit import DropPlan
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError
from megaskip.parallel.engine import Engine
from megaskip.progress import ProgressBatches, progress_bar
from megaskip.reporting.summary import versions
from megaskip.routing import RouterSet


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a fit chose and measured."""

    order: list[int]
    """Dropped layers, the first to go first."""
    steps: list[Dropped]
    """What the greedy order measured; empty for other orders."""
    explained: dict[int, float]
    """Share of each dropped update's variance that its map explains."""
    dense: float
    """Held-out loss in nats a supervised token: of the dense model,"""
    dropped: float
    """with the layers dropped,"""
    compensated: float
    """and with the maps in their places."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the closing table."""
        dropped = f"{self.dropped:.4f} ({self.dropped - self.dense:+.4f})"
        compensated = f"{self.compensated:.4f} ({self.compensated - self.dense:+.4f})"
        return [
            ("dropped, first to go first", ", ".join(map(str, self.order))),
            ("held-out loss, dense", f"{self.dense:.4f}"),
            ("layers dropped", dropped),
            *([("maps in their places", compensated)] if self.explained else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the content of fit.json."""
        return {
            "order": self.order,
            "calibration_loss": {str(step.layer): step.loss for step in self.steps},
            "explained": {str(layer): share for layer, share in self.explained.items()},
            "held_out": {
                "loss_dense": self.dense,
                "loss_dropped": self.dropped,
                "loss_compensated": self.compensated,
            },
            "versions": versions(),
        }


def candidate_layers(plan: DropPlan, depth: int) -> tuple[tuple[int, ...], int]:
    """Return (layers that may be dropped, how many are) of a model of `depth` layers; raises
    ConfigError when they are too few."""
    if plan.drop_layers is not None:
        layers = resolve_layers(f"{plan.drop_layers},", depth, flag="drop_layers")
        return layers, len(layers)
    if plan.candidates is None and depth < 2:
        raise ConfigError(
            "the model has one layer, and the first stays unless it is named; name it with "
            "--drop_layers 0 (--target mlp), or take a deeper model"
        )
    spec = plan.candidates if plan.candidates is not None else f"1-{depth - 1}"
    candidates = resolve_layers(f"{spec},", depth, flag="candidates")
    count = max(round(depth * plan.drop / 100), 1)
    if count > len(candidates):
        raise ConfigError(
            f"--drop {plan.drop:g} asks for {count} of {depth} layers, and {len(candidates)} may "
            "go (--candidates); ask for less, or let more go"
        )
    return candidates, count


def static_routers(routers: RouterSet, layers: Sequence[int]) -> RouterSet:
    """Return routers of `layers` alone, which never run, with the compensations of `routers`."""
    chosen = tuple(sorted(layers))
    settings = {"layers": chosen, "budget": "static", "capacity": 0.0, "threshold": 0.5}
    config = RouterConfig(**{**_fields(routers.config), **settings})
    static = RouterSet(config, chosen, routers.hidden_size, experts=routers.experts)
    weights = {name: tensor.cpu() for name, tensor in routers.state_dict().items()}
    static.load_state_dict({name: weights[name] for name in static.state_dict()})
    return static


def _fields(config: RouterConfig) -> dict[str, Any]:
    names = ("granularity", "router", "compensation", "compensation_rank", "pool", "prompt_tokens")
    return {name: getattr(config, name) for name in names}


def fit_static_drop(
    engine: Engine,
    loader: DataLoader,
    plan: DropPlan,
    count: int,
    *,
    hidden: bool | None,
    progress: FitProgress | None = None,
) -> Fitted:
    """Fit the maps of all candidates, choose `count` layers, and measure what is lost without them
    on held-out text. `hidden` is `disable` of progress_bar. With `progress` it goes on
    from where that stands. Collective."""
    explained: dict[int, float] = {}
    if plan.compensation != "none":
        rows = ProgressBatches(loader.calibration(plan.rows), "fitting", disable=hidden)
        explained = fit_compensation(engine, rows, progress=progress)
    order, steps = _order(engine, loader, plan, count, hidden, progress)
    held_out = ProgressBatches(loader.held_out(), "held out", disable=hidden)
    with engine.routers.disabled():
        dense = engine.evaluate(held_out, routed=True).loss
        require_finite(dense, "the held-out loss of the dense model")
        with engine.routers.override(dict.fromkeys(order, 0.0)):
            compensated = engine.evaluate(held_out, routed=True).loss
            with without_maps(engine.routers):
                dropped = engine.evaluate(held_out, routed=True).loss
    return Fitted(
        order=order,
        steps=steps,
        explained={layer: explained[layer] for layer in order if layer in explained},
        dense=dense,
        dropped=dropped,
        compensated=compensated,
    )


def _order(
    engine: Engine,
    loader: DataLoader,
    plan: DropPlan,
    count: int,
    hidden: bool | None,
    kept: FitProgress | None,
) -> tuple[list[int], list[Dropped]]:
    """Return (layers to drop, the first to go first; what was measured for a greedy order)."""
    layers = engine.routers.layers
    if plan.drop_layers is not None:
        return list(layers), []
    batches = loader.calibration(plan.order_rows)
    if plan.order == "cosine":
        similarity = mean_similarity(engine, batches)
        return sorted(layers, key=lambda layer: -similarity[layer])[:count], []
    with progress_bar(desc="choosing layers", unit="pass", disable=hidden) as bar:
        _, steps = greedy_drop_order(engine, batches, count, progress=bar.update, kept=kept)
    return [step.layer for step in steps], steps


@contextlib.contextmanager
def without_maps(routers: RouterSet) -> Iterator[None]:
    """Hold a context in which compensations are zero."""
    maps = (routers.router(layer).compensation for layer in routers.layers)
    written = [p for m in maps if m is not None for n, p in m.named_parameters() if n != "down"]
    before = [parameter.clone() for parameter in written]
    with torch.no_grad():
        for parameter in written:
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, values in zip(written, before, strict=True):
                parameter.copy_(values)
