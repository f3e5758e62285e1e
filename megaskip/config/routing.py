"""What inference has to know of a model's routers; what only training asks is RouterConfig's."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from megaskip.config.checks import one_of
from megaskip.errors import ConfigError

SUBLAYER_GRANULARITIES = (
    "attn_sequence",
    "attn_token",
    "mlp_sequence",
    "mlp_token",
    "block_sequence",
    "block_token",
)
"""What any decoder can skip: its sublayers and layers."""
GRANULARITIES = (*SUBLAYER_GRANULARITIES, "expert_token")
"""What mixtures of experts can skip, too: a token at one of the experts that it is given to."""
POOLS = ("prompt", "all")
BUDGETS = ("global", "layer", "static", "dense")
UNDECIDED = ("static", "dense")
"""Budgets under which nothing is decided, so that no router learns."""
COMPENSATIONS = ("none", "bias", "low_rank")
ROUTERS = ("linear", "affine", "mlp")
ROUTER_INPUTS = ("own", "first")
KV_CHOICES = ("keep", "drop")
"""Whether tokens that skip an attention are attended to by later ones, in inference."""


_ADDED = {
    "capacity_low",
    "calibrated",
    "router",
    "router_input",
    "compensation",
    "compensation_rank",
    "freeze_routers",
}
"""Settings that files from before them lack; their defaults are what those files meant."""


Threshold = float | tuple[float, ...]
"""Of all routed layers alike, or one of each, in ascending order of the layers: a score inside
(0, 1), or the logit of one that is so near to 0 or 1 that scores are no longer told apart."""
SATURATED = 15.0
"""Size of a logit from which on a threshold is a logit: up to here a float64 score tells apart all
float32 logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """The routers of one model: what they skip, where, and from which score on."""

    granularity: str = field(
        default="attn_sequence", metadata={"choices": GRANULARITIES, "metavar": "GRANULARITY"}
    )
    """What one decision covers: {attn,mlp,block} of a layer, for a whole {sequence} or for each
    {token}; or, in a mixture of experts, each token at each of its experts (expert_token)."""
    router: str = field(default="linear", metadata={"choices": ROUTERS})
    """What scores a unit: "linear" (as published), "affine" (with a bias, so that a layer can be
    worth little for all), or "mlp" (one hidden layer of 16)."""
    router_input: str = field(default="own", metadata={"choices": ROUTER_INPUTS})
    """What the router of a layer reads: what its own layer reads ("own", as published), or what the
    first routed layer reads ("first": everything is decided there, a GPU is waited for once in a
    prefill; on the real model that was tried, one seed of two lost much more)."""
    layers: int | str | Sequence[int] = field(default="half", metadata={"metavar": "SPEC"})
    """Routed layers: "half" (the deepest half except the last, as published), a count of deepest
    layers (the last excluded), or a list such as 8-14,16 (one layer alone is written 12-12)."""
    capacity: float = 0.5
    """Fraction of sequences (or tokens, or tokens at experts) that the routed sublayers keep,
    averaged over layers and batch."""
    threshold: Threshold = 0.5
    """A unit runs when its score (a sigmoid) is at least this; `megaskip calibrate --allocate`
    finds one for each routed layer. A number of 15 or more, or of -15 or less, is a logit."""
    pool: str = field(default="prompt", metadata={"choices": POOLS})
    """Tokens that a sequence's decision looks at: "prompt" (causal: the same in training, scoring
    and generation) or "all" (every real token, as published)."""
    prompt_tokens: int = 32
    """With pool=prompt, a row without a prompt (plain text) is judged by its first so many
    tokens."""
    compensation: str = field(default="none", metadata={"choices": COMPENSATIONS})
    """What a skipped unit gets in the place of its sublayer: "none" (nothing, as published), "bias"
    (a constant), or "low_rank" (a linear map of what the sublayer reads, and a constant)."""
    compensation_rank: int = 64
    """Rank of --compensation low_rank; 2 x hidden size x rank parameters for each routed layer."""
    budget: str = field(default="global", metadata={"choices": BUDGETS})
    """What is held to the capacity: "global" (all routed layers and the global batch together,
    steered until it is hit), "layer" (each layer and micro-batch by a hinge, as published), or
    "static" (no layer of --layers ever runs: nothing is decided, the compensation alone trains), or
    "dense" (all of them always run: the adapters of --lora_rank alone train, to compare with)."""
    calibrated: tuple[tuple[float, Threshold], ...] = field(default=(), metadata={"flag": False})
    """(capacity, threshold) pairs, ascending: where calibration text kept which capacity."""

    def __post_init__(self) -> None:
        pairs = {float(c): _as_threshold(t) for c, t in self.calibrated}
        object.__setattr__(self, "calibrated", tuple((c, pairs[c]) for c in sorted(pairs)))
        object.__setattr__(self, "threshold", _as_threshold(self.threshold))
        if self.budget in UNDECIDED:
            object.__setattr__(self, "capacity", float(self.budget == "dense"))
        problems = tuple(self._problems())
        if problems:
            raise ConfigError(*problems)

    def at_capacity(self, capacity: float) -> Self:
        """Return this configuration with the threshold at which calibration text kept `capacity`.

        Raises ConfigError, with those that are calibrated, for another one.
        """
        for known, threshold in self.calibrated:
            if math.isclose(known, capacity, abs_tol=1e-6):
                return dataclasses.replace(self, capacity=known, threshold=threshold)
        listed = ", ".join(f"{known:g}" for known, _ in self.calibrated) or "none"
        raise ConfigError(
            f"capacity {capacity:g} is not calibrated (calibrated: {listed}); add it with "
            f"megaskip calibrate --capacity {capacity:g}, or choose one of these"
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Return settings that were stored as `dataclasses.asdict` gives them; what else `stored`
        holds is left alone.

        Raises ConfigError when a setting is missing that had to be stored, or is wrong.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        missing = [name for name in names if name not in stored and name not in _ADDED]
        if missing:
            raise ConfigError(f"lacks {', '.join(missing)}")
        return cls(**{name: stored[name] for name in names if name in stored})

    @property
    def target(self) -> str:
        """Return what is skipped: attn, mlp, block or expert."""
        return self.granularity.split("_")[0]

    @property
    def unit(self) -> str:
        """Return what one decision covers: sequence or token."""
        return self.granularity.split("_")[1]

    @property
    def routes_experts(self) -> bool:
        """Return whether what is skipped is a token at one of its experts."""
        return self.target == "expert"

    def _problems(self) -> Iterator[str]:
        for item in dataclasses.fields(self):
            if choices := item.metadata.get("choices"):
                yield from one_of(item.name, getattr(self, item.name), choices)
        for threshold in (self.threshold, *(given for _, given in self.calibrated)):
            for score in (threshold,) if isinstance(threshold, float) else threshold:
                if not (0.0 < score < 1.0 or abs(score) >= SATURATED):
                    yield f"--threshold {score:g} must lie inside (0, 1): scores are sigmoids"
            if not isinstance(threshold, float) and not threshold:
                yield "--threshold has no number; it needs one, or one for each routed layer"


def _as_threshold(value: Threshold | list[float]) -> Threshold:
    """Return a threshold as it is stored; JSON has lists."""
    if isinstance(value, (list, tuple)):
        return tuple(float(score) for score in value)
    return float(value)
