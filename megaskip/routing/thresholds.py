"""Where each routed layer's threshold lies: a unit runs when its score reaches it.

Shapes: B rows, U units of decision in a row.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from megaskip.config.routing import RoutingConfig
from megaskip.errors import ConfigError

_FAR = 30.0
"""Logit of a threshold above every score, or with its sign turned below: float64 still holds its
sigmoid apart from 1."""


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
        scores = [given] * count if isinstance(given, float) else given
        if config.budget == "static":
            scores = [score_of(math.inf)] * count
        if len(scores) != count:
            raise ConfigError(
                f"threshold holds {len(scores)} numbers for {count} routed layers; give one for "
                "all, or one for each"
            )
        self.logits = dict(zip(self._layers, map(logit_of, scores), strict=True))

    def keep(self, logit: Tensor, layer: int) -> Tensor:
        """Return which units of a layer run, float32 [B, U], 1 = run, given their logits.

        Logits are compared, not scores: in bfloat16 sigmoid(z) rounds to 0.5 for z in (-0.004, 0].
        """
        return (logit.detach() >= self.logits[layer]).float()


def logit_of(score: float) -> float:
    """Return the logit of a score inside (0, 1)."""
    return math.log(score / (1 - score))


def score_of(logit: float) -> float:
    """Return the score of a logit, inside (0, 1) for infinite ones too."""
    return 1 / (1 + math.exp(-min(max(logit, -_FAR), _FAR)))
