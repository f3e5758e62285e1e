"""What the routers decide about, and what capacity they are asked to end at. No defaults hidden
elsewhere."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from megaskip.config.checks import at_least, share, share_hint
from megaskip.config.routing import SATURATED, UNDECIDED, RoutingConfig
from megaskip.config.value_types import wrong_types
from megaskip.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(RoutingConfig):
    """The routers of one model: what they skip, where, and how much of it they keep."""

    capacity_low: float | None = None
    """Train one set of routers for every capacity from this to 1: each step asks for another one,
    some for less. Then `megaskip calibrate` finds the thresholds [off: for --capacity alone]."""
    penalty_weight: float = 0.1
    """Strength of the capacity penalty: gain of the steering (global) or factor of the hinge
    (layer)."""
    freeze_routers: bool = False
    """Keep the routers of --init_routers as they are, for example those of megaskip fit-routers;
    only their compensations learn, and adapters. Training begins at the threshold that was
    calibrated there for --capacity, which moves a little to hold it."""

    def __post_init__(self) -> None:
        if problems := tuple(wrong_types(self)):
            raise ConfigError(*problems)
        RoutingConfig.__post_init__(self)

    def at_capacity(self, capacity: float) -> Self:
        """Return this configuration with the threshold at which calibration text kept `capacity`.

        Raises ConfigError, with those that are calibrated, for another one.
        """
        return RoutingConfig.at_capacity(dataclasses.replace(self, capacity_low=None), capacity)

    @property
    def skips_attention_by_token(self) -> bool:
        """Return whether single tokens skip attention, so that their keys and values matter."""
        return self.unit == "token" and self.target in ("attn", "block")

    def describe_threshold(self) -> str:
        """Return the threshold as text: "0.5", "logit 41.2", or "0.3113 to 0.6201 by layer"."""
        if isinstance(self.threshold, float):
            is_logit = abs(self.threshold) >= SATURATED
            return f"logit {self.threshold:.6g}" if is_logit else f"{self.threshold:.6g}"
        scores = [min(max(threshold, 0.0), 1.0) for threshold in self.threshold]
        return f"{min(scores):.4f} to {max(scores):.4f} by layer"

    def _problems(self) -> Iterator[str]:
        yield from RoutingConfig._problems(self)
        if self.granularity == "expert_token":
            yield from self._problems_of_experts()
        for problem in share("capacity", self.capacity):
            yield problem + share_hint(self.capacity)
        if self.capacity_low is not None:
            yield from share("capacity_low", self.capacity_low)
            if self.capacity_low > self.capacity:
                yield (
                    f"--capacity_low {self.capacity_low:g} is above --capacity {self.capacity:g}: "
                    "lower it, or leave it out to train for one capacity"
                )
            if self.budget != "global":
                yield "--capacity_low needs --budget global: the others have no threshold to move"
        if self.freeze_routers and self.budget in UNDECIDED:
            yield (
                f"--freeze_routers does not go with --budget {self.budget}: no router decides "
                "there, and none learns; leave it out"
            )
        if self.freeze_routers and self.budget == "layer":
            yield (
                "--freeze_routers does not go with --budget layer, which holds a capacity by what "
                "routers learn; leave --budget out: the threshold moves"
            )
        if self.freeze_routers and self.capacity_low is not None:
            yield (
                "--freeze_routers does not go with --capacity_low, which asks routers that learn "
                "for other capacities in turn; leave one of them out"
            )
        yield from at_least("compensation_rank", self.compensation_rank, 1)
        yield from at_least("prompt_tokens", self.prompt_tokens, 1)
        yield from at_least("penalty_weight", self.penalty_weight, 0.0)

    def _problems_of_experts(self) -> Iterator[str]:
        if self.router_input == "first":
            yield (
                "--router_input first does not go with --granularity expert_token: which experts a "
                "token is given to is known in its own layer only; leave it out"
            )
        if self.compensation != "none":
            yield (
                f"--compensation {self.compensation} does not go with --granularity expert_token: "
                "the other experts of a token stand in for one that is skipped; leave it out"
            )
