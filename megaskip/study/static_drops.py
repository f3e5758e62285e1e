"""Layers dropped for every text, compared like everything else: in which order, and with which maps
in their places."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.calibration.drop_order import greedy_drop_order
from megaskip.calibration.fit import fit_compensation
from megaskip.calibration.static_drop import static_routers
from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import (
    CONFIG,
    load_router_tensors,
    read_router_config,
    save_routers,
)
from megaskip.config.commands.compare import FITTED_BASELINES
from megaskip.errors import ConfigError
from megaskip.routing import RouterSet
from megaskip.study.baselines import Policy, skipping
from megaskip.study.comparison import Comparison
from megaskip.study.training_costs import count_flops

STATIC = {
    "static": ("cosine", "none"),
    "greedy": ("greedy", "none"),
    "static_fitted": ("cosine", "fitted"),
    "greedy_fitted": ("greedy", "fitted"),
    "static_trained": ("cosine", "trained"),
    "greedy_trained": ("greedy", "trained"),
    "static_lora": ("cosine", "lora"),
    "greedy_trained_lora": ("greedy", "trained"),
}
"""Methods: (order of the layers, maps in their places; or adapters of what stays). A run of a name
that ends in _lora trains adapters, too."""
LEARNT = ("trained", "lora")
"""What of these a run trains."""


class StaticDrops:
    """The static methods of one comparison. What is fitted and ordered is computed once."""

    def __init__(
        self,
        comparison: Comparison,
        *,
        most: float,
        rank: int,
        order_rows: int,
        cost_file: Path | None = None,
    ) -> None:
        """`most` is the largest share of all units that is skipped, `rank` that of the maps,
        `order_rows` the calibration rows on which a greedy order is measured; what a fit takes is
        written to `cost_file`."""
        self._comparison, self._cost_file = comparison, cost_file
        self._count = math.ceil(most * comparison.depth)
        self._order_batches = comparison.some_calibration(order_rows)
        self._config = dataclasses.replace(
            comparison.plain, compensation="low_rank", compensation_rank=rank
        )
        self._maps: dict[str, Tensor] | None = None
        self._orders: dict[tuple[str, bool], list[int]] = {}

    def order(self, kind: str, *, with_maps: bool) -> list[int]:
        """Return layers, the first to go first, by cosine or by measured loss (greedy)."""
        key = (kind, with_maps and kind == "greedy")
        if key not in self._orders:
            if kind == "cosine":
                self.put(with_maps=False)  # of the frozen model, without anyone's adapter
                similarity = self._comparison.similarity()
                ranked = sorted(self._comparison.layers, key=lambda layer: -similarity[layer])
                self._orders[key] = ranked
            else:
                self.put(with_maps=with_maps)
                _, steps = greedy_drop_order(
                    self._comparison.engine, self._order_batches, self._count
                )
                self._orders[key] = [step.layer for step in steps]
        return self._orders[key]

    def put(self, *, with_maps: bool) -> None:
        """Put routers on the model that have the maps in closed form, or no maps."""
        if not with_maps:
            self._comparison.attach(self._comparison.plain)
            return
        self._comparison.attach(self._config)
        routers = self._comparison.routers
        if self._maps is None:
            self._fit()
            self._maps = {name: tensor.clone() for name, tensor in routers.state_dict().items()}
        routers.load_state_dict(self._maps)

    def _fit(self) -> None:
        """Fit the maps of all routed layers, and write what that took."""
        comparison, begun = self._comparison, time.monotonic()
        flops = count_flops(lambda: fit_compensation(comparison.engine, comparison.calibration))
        seconds = time.monotonic() - begun
        if self._cost_file is not None:
            self._cost_file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._cost_file, {"seconds": seconds, "flops": flops})

    def fit_cost(self, method: str, skip: float) -> dict[str, Any] | None:
        """Return seconds, FLOPs, parameters and bytes of the fit behind a static method, or a
        baseline; None where there was none. It fits the maps of all routed layers, of which those
        that are dropped are kept, or all where documents skip different ones."""
        keeps_all = method == "random_fitted"
        learns = "fitted" if method in FITTED_BASELINES else STATIC.get(method, ("", ""))[1]
        is_fitted = learns in ("fitted", "trained")
        if not is_fitted or self._cost_file is None or not self._cost_file.is_file():
            return None
        comparison = self._comparison
        kept = len(comparison.layers) / comparison.depth if keeps_all else skip
        parameters = map_parameters(comparison, kept, self._config.compensation_rank)
        return read_json(self._cost_file) | {"parameters": parameters, "bytes": 4 * parameters}

    def policy(self, method: str, skip: float) -> Policy:
        """Return a policy that drops for every text, with what it needs put on the model; not for
        what is trained."""
        kind, maps = STATIC[method]
        ranked = self.order(kind, with_maps=maps != "none")
        self.put(with_maps=maps != "none")
        layers, depth = self._comparison.layers, self._comparison.depth
        return skipping(lambda document, count: ranked, layers, skip * depth)

    def write_start(self, method: str, skip: float, folder: Path, base: BaseModel) -> Path:
        """Write the router folder from which a trained method starts, unless it is there."""
        if not (folder / CONFIG).is_file():
            kind, learns = STATIC[method]
            with_maps = learns == "trained"
            dropped = self.order(kind, with_maps=with_maps)
            dropped = dropped[: layers_for(self._comparison, skip)]
            self.put(with_maps=with_maps)
            save_routers(folder, static_routers(self._comparison.routers, dropped), base=base)
        return folder

    def take(self, routers: Path) -> Policy:
        """Put the trained maps, or adapters, of a router folder on the model; return the policy
        that drops its layers. Raises ConfigError for what the comparison does not skip."""
        config, layers, _ = read_router_config(routers)
        plain, routed = self._comparison.plain, self._comparison.layers
        if config.granularity != plain.granularity or not set(layers) <= set(routed):
            raise ConfigError(
                f"{routers}: drops {config.granularity} of layers {layers}, the comparison skips "
                f"{plain.granularity} of {routed}; remove the run and what it starts from, or take "
                "another --output"
            )
        stored = RouterSet(config, layers, self._comparison.routers.hidden_size)
        # Maps of its own rank, which --no_training need not ask for.
        kind, rank = config.compensation, config.compensation_rank
        own = dataclasses.replace(plain, compensation=kind, compensation_rank=rank)
        self._comparison.attach(own, routers)
        weights = load_router_tensors(routers, stored)
        self._comparison.routers.load_state_dict(weights, strict=False)
        return dropping(layers, routed)


def layers_for(comparison: Comparison, skip: float) -> int:
    """Return the whole number of layers nearest to the share `skip` of all."""
    return max(int(skip * comparison.depth + 0.5), 1)


def map_parameters(comparison: Comparison, skip: float, rank: int) -> int:
    """Return how many parameters maps of `rank` in the place of the share `skip` of all layers
    have: x A B + b."""
    return layers_for(comparison, skip) * comparison.routers.hidden_size * (2 * rank + 1)


def dropping(dropped: tuple[int, ...], layers: tuple[int, ...]) -> Policy:
    """Return the policy that drops the layers `dropped` of the routed `layers` for every text."""

    def policy(documents: object) -> Mapping[int, Tensor]:
        return {layer: torch.tensor(float(layer not in dropped)) for layer in layers}

    return policy
