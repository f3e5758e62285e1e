"""What the routers decide about, and what capacity they are asked to end at. No defaults hidden
elsewhere."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaskip.config.checks import at_least, one_of, within
from megaskip.errors import ConfigError

GRANULARITIES = (
    "attn_sequence",
    "attn_token",
    "mlp_sequence",
    "mlp_token",
    "block_sequence",
    "block_token",
)
POOLS = ("prompt", "all")
BUDGETS = ("global", "layer", "static")
COMPENSATIONS = ("none", "bias", "low_rank")
ROUTERS = ("linear", "affine", "mlp")
KV_CHOICES = ("keep", "drop")
"""Whether tokens that skip an attention are attended to by later ones, in inference."""


_ADDED = {"capacity_low", "calibrated", "router", "compensation", "compensation_rank"}
"""Settings that files from before them lack; their defaults are what those files meant."""


Threshold = float | tuple[float, ...]
"""Of all routed layers alike, or one of each, in ascending order of the layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The routers of one model: what they skip, where, and how much of it they keep."""

    granularity: str = field(
        default="attn_sequence", metadata={"choices": GRANULARITIES, "metavar": "GRANULARITY"}
    )
    """What one decision covers: {attn,mlp,block} of a layer, for a whole {sequence} or for each
    {token}."""
    router: str = field(default="linear", metadata={"choices": ROUTERS})
    """What scores a unit: "linear" (as published), "affine" (with a bias, so that a layer can be
    worth little for all), or "mlp" (one hidden layer of 16)."""
    layers: int | str | Sequence[int] = field(default="half", metadata={"metavar": "SPEC"})
    """Routed layers: "half" (the deepest half except the last, as published), a count of deepest
    layers (the last excluded), or a list such as 8-14,16 (one layer alone is written 12-12)."""
    capacity: float = 0.5
    """Fraction of sequences (or tokens) that the routed sublayers keep, averaged over layers and
    batch."""
    capacity_low: float | None = None
    """Train one set of routers for every capacity from this to 1: each step asks for another one,
    some for less. Then `megaskip calibrate` finds the thresholds [off: for --capacity alone]."""
    threshold: Threshold = 0.5
    """A unit runs when its score (a sigmoid) is at least this; `megaskip calibrate --allocate`
    finds one for each routed layer."""
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
    "static" (no layer of --layers ever runs: nothing is decided, the compensation alone trains)."""
    penalty_weight: float = 0.1
    """Strength of the capacity penalty: gain of the steering (global) or factor of the hinge
    (layer)."""
    calibrated: tuple[tuple[float, Threshold], ...] = field(default=(), metadata={"flag": False})
    """(capacity, threshold) pairs, ascending: where calibration text kept which capacity."""

    def __post_init__(self) -> None:
        pairs = {float(c): _as_threshold(t) for c, t in self.calibrated}
        object.__setattr__(self, "calibrated", tuple((c, pairs[c]) for c in sorted(pairs)))
        object.__setattr__(self, "threshold", _as_threshold(self.threshold))
        if self.budget == "static":
            object.__setattr__(self, "capacity", 0.0)
        problems = tuple(self._problems())
        if problems:
            raise ConfigError(*problems)

    def at_capacity(self, capacity: float) -> "RouterConfig":
        """Return this configuration with the threshold at which calibration text kept `capacity`.

        Raises ConfigError, with those that are calibrated, for another one.
        """
        for known, threshold in self.calibrated:
            if math.isclose(known, capacity, abs_tol=1e-6):
                return dataclasses.replace(
                    self, capacity=known, threshold=threshold, capacity_low=None
                )
        listed = ", ".join(f"{one:g}" for one, _ in self.calibrated) or "none"
        raise ConfigError(
            f"capacity {capacity:g} is not calibrated (calibrated: {listed}); add it with "
            f"tools/calibrate.py --capacity {capacity:g}, or choose one of these"
        )

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "RouterConfig":
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
        """Return what is skipped: attn, mlp or block."""
        return self.granularity.split("_")[0]

    @property
    def unit(self) -> str:
        """Return what one decision covers: sequence or token."""
        return self.granularity.split("_")[1]

    @property
    def skips_attention_by_token(self) -> bool:
        """Return whether single tokens skip attention, so that their keys and values matter."""
        return self.unit == "token" and self.target != "mlp"

    def describe_threshold(self) -> str:
        """Return the threshold as text: "0.5", or "0.3113 to 0.6201 by layer"."""
        if isinstance(self.threshold, float):
            return f"{self.threshold:.6g}"
        return f"{min(self.threshold):.4f} to {max(self.threshold):.4f} by layer"

    def _problems(self) -> Iterator[str]:
        yield from one_of("granularity", self.granularity, GRANULARITIES)
        yield from within("capacity", self.capacity, 0.0, 1.0)
        if self.capacity_low is not None:
            yield from within("capacity_low", self.capacity_low, 0.0, 1.0)
            if self.capacity_low > self.capacity:
                yield (
                    f"--capacity_low {self.capacity_low:g} is above --capacity {self.capacity:g}: "
                    "lower it, or leave it out to train for one capacity"
                )
            if self.budget != "global":
                yield "--capacity_low needs --budget global: the others have no threshold to move"
        for threshold in (self.threshold, *(one for _, one in self.calibrated)):
            for one in (threshold,) if isinstance(threshold, float) else threshold:
                if not 0.0 < one < 1.0:
                    yield f"--threshold {one:g} must lie inside (0, 1): scores are sigmoids"
            if not isinstance(threshold, float) and not threshold:
                yield "--threshold has no number; it needs one, or one for each routed layer"
        yield from one_of("router", self.router, ROUTERS)
        yield from one_of("pool", self.pool, POOLS)
        yield from one_of("budget", self.budget, BUDGETS)
        yield from one_of("compensation", self.compensation, COMPENSATIONS)
        yield from at_least("compensation_rank", self.compensation_rank, 1)
        yield from at_least("prompt_tokens", self.prompt_tokens, 1)
        yield from at_least("penalty_weight", self.penalty_weight, 0.0)


def _as_threshold(value: Threshold | list[float]) -> Threshold:
    """Return a threshold as it is stored; JSON has lists."""
    if isinstance(value, (list, tuple)):
        return tuple(float(one) for one in value)
    return float(value)
