"""Routers that give every unit the same score, as all do before training: made to tell units apart.

No threshold divides equal scores. A capacity between all and nothing then needs some order of the
units, and any fixed one is as good as another.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch

from megaskip.config import RouterConfig, Threshold
from megaskip.log import get_logger
from megaskip.routing import RouterSet
from megaskip.routing.thresholds import logit_of, threshold_of

logger = get_logger(__name__)

_SIZE = 1e-3
"""Length of a direction: logits of about this size, which matter beside equal ones only."""


@torch.no_grad()
def give_directions(routers: RouterSet) -> dict[int, float]:
    """Give each router whose weights are zero a small direction in what it reads, by which its
    units differ; return by layer the logit that all of them had.

    Experts that a bias tells apart are not such routers.

    Directions are pseudo-random, of a layer always the same: units are then skipped by chance, but
    the same ones in training, scoring and generation, for any batch and on every rank.
    """
    logits = {}
    for layer in routers.layers:
        router = routers.router(layer)
        bias = getattr(router, "bias", router.weight.new_zeros(1))
        if router.weight.any() or bool((bias != bias[0]).any()):
            continue
        logits[layer] = float(bias[0])
        generator = torch.Generator().manual_seed(layer)
        direction = torch.randn(router.weight.shape, generator=generator)
        router.weight.copy_(_SIZE * direction / direction.norm())
    if logits:
        logger.warning(
            "the routers of layers %s have learnt nothing: they give every unit the same score. "
            "They now choose by a fixed direction, which is no better than chance",
            ", ".join(map(str, logits)),
        )
    return logits


def decide_as_before(
    config: RouterConfig, layers: tuple[int, ...], logits: Mapping[int, float]
) -> RouterConfig:
    """Return `config` of routers of `layers` with thresholds that decide for routers with a
    direction as they did without: all units of such a layer, whose `logits` were equal, or none."""

    def before(threshold: Threshold) -> Threshold:
        given = [threshold] * len(layers) if isinstance(threshold, float) else threshold
        return tuple(
            _all_or_none(value, logits[layer]) if layer in logits else value
            for layer, value in zip(layers, given, strict=True)
        )

    return dataclasses.replace(
        config,
        threshold=before(config.threshold),
        calibrated=tuple((capacity, before(t)) for capacity, t in config.calibrated),
    )


def _all_or_none(threshold: float, logit: float) -> float:
    return threshold_of(-math.inf if logit >= logit_of(threshold) else math.inf)
