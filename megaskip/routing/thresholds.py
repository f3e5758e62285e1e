"""Where each routed layer's threshold lies: a unit runs when its score reaches it.

Shapes: B rows, U units of decision in a row.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from megaskip.config.routing import SATURATED, UNDECIDED, RoutingConfig
from megaskip.errors import ConfigError

_FAR = 1e9
"""Logit of a threshold above every score, or with its sign turned below."""


class Thresholds:
    """The rule of inference: the logits of a layer are compared with the layer's threshold."""

    def __init__(self, config: RoutingConfig, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self.logits: dict[int, float] = {}
        """The threshold of each routed layer, as a logit."""
        self.configure(config)

    def configure(self, config: RoutingConfig) -> None:
        """Take over the thresholds of `config`.

        Raises ConfigError when it has another number of them than there are routed layers.
        """
        given, count = config.threshold, len(self._layers)
        by_layer = [given] * count if isinstance(given, float) else given
        if config.budget in UNDECIDED:
            by_layer = [_FAR if config.budget == "static" else -_FAR] * count
        if len(by_layer) != count:
            raise ConfigError(
                f"threshold holds {len(by_layer)} numbers for {count} routed layers; give one for "
                "all, or one for each"
            )
        self.logits = dict(zip(self._layers, map(logit_of, by_layer), strict=True))

    def keep(self, logit: Tensor, layer: int) -> Tensor:
        """Return which units of a layer run, float32 [B, U], 1 = run, given their logits.

        Logits are compared, not scores: in bfloat16 sigmoid(z) rounds to 0.5 for z in (-0.004, 0].
        """
        return (logit.detach() >= self.logits[layer]).float()


def logit_of(threshold: float) -> float:
    """Return the logit of a threshold as it is stored: a score inside (0, 1), or a logit."""
    if abs(threshold) >= SATURATED:
        return threshold
    return math.log(threshold / (1 - threshold))


def threshold_of(logit: float) -> float:
    """Return a threshold as it is stored, for infinite logits too: its score where float64 tells it
    from others, else the logit."""
    if abs(logit) >= SATURATED:
        return min(max(logit, -_FAR), _FAR)
    return 1 / (1 + math.exp(-logit))
