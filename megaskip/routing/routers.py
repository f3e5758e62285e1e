"""All routers of a model in one module: their parameters, their settings, and their gates.

What inference needs; RouterSet adds what training needs. Shapes: B rows, T tokens, U units of
decision in a row.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config.routing import RoutingConfig
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Executor
from megaskip.routing.experts import Experts
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling
from megaskip.routing.precision import without_cast
from megaskip.routing.router import Router, make_router
from megaskip.routing.state import RoutingState
from megaskip.routing.thresholds import Thresholds


class Routers(nn.Module):
    """Routers keyed by absolute layer index and target: "12.attn.weight" float32 [1, D], or
    "12.expert.weight" [E, D] with one row for each of a layer's E experts.

    Before a forward pass `set_batch` tells which tokens are real; plain calls of a model do so by
    themselves.
    """

    def __init__(
        self,
        config: RoutingConfig,
        layers: Sequence[int],
        hidden_size: int,
        *,
        executor: Executor,
        experts: Experts | None = None,
        thresholds: Thresholds | None = None,
        gate: type[Gate] = Gate,
        device: torch.device | None = None,
    ) -> None:
        """`experts` are those of each layer, where they are what is skipped."""
        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        self.thresholds = thresholds or Thresholds(config, layers)
        self.experts = experts
        self.state = RoutingState(executor, config.unit, self.choices)
        gates = {}
        for layer in self.layers:
            router = make_router(config, hidden_size, experts=experts, device=device)
            self.add_module(str(layer), nn.ModuleDict({config.target: router}))
            gates[layer] = gate(layer, config.target, router, self.thresholds, self.state)
        self.gates: Mapping[int, Gate] = gates
        if config.router_input == "first":
            first, *first.followers = gates.values()
            for follower in first.followers:
                follower.follows = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.half() is about the model's weights: rounded routers decide otherwise.
        return super()._apply(without_cast(fn), recurse)  # type: ignore[no-untyped-call]

    @property
    def choices(self) -> int:
        """Return how many decisions there are about a token, where tokens decide: one, or one for
        each of its experts."""
        return 1 if self.experts is None else self.experts.per_token

    @property
    def executor(self) -> Executor:
        """Return what runs the sublayers, given a decision."""
        return self.state.executor

    def router(self, layer: int) -> Router:
        """Return the router of a layer."""
        return self.get_submodule(f"{layer}.{self.config.target}")  # type: ignore[return-value]

    # -- before the forward pass

    def set_batch(
        self,
        token_mask: Tensor,
        prompt_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segments: int | None = None,
    ) -> None:
        """Say what the next forward pass holds: a sublayer cannot see padding by itself.

        `token_mask` bool [B, T] marks real tokens; `prompt_mask` bool [B, T] those that a sequence
        is judged by under pool="prompt" (all real ones without it); `segment_ids` int64 [B, T] the
        segments of packed rows (padding -1). A row has at most `segments`; without that number the
        device is waited for. It holds for one forward pass.
        """
        pooling = self.pooling(token_mask, prompt_mask, segment_ids, segments)
        self.state.begin(pooling, described=True)

    def pooling(
        self,
        token_mask: Tensor,
        prompt_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segments: int | None = None,
    ) -> Pooling:
        """Return what each decision about a batch looks at; arguments as in `set_batch`."""
        pooled = token_mask if prompt_mask is None or self.config.pool == "all" else prompt_mask
        unit, choices = self.config.unit, self.choices
        return Pooling.of(unit, token_mask, pooled, segment_ids, segments, choices=choices)

    def override(
        self, keep: Mapping[int, Tensor | float]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which `keep` decides, by layer: a number, or a tensor [B, U]; 1 =
        run.

        Layers that it does not name decide as they did outside, by an outer override or by
        themselves. For probes, benchmarks and baselines; a router still has its straight-through
        gradient.
        """
        return self.state.override(keep)

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which everything runs: the unrouted base model."""
        return self.override(dict.fromkeys(self.layers, 1.0))

    # -- after it

    def decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions by layer, with logits and units."""
        return dict(sorted(self.state.decisions.items()))

    def keep(self) -> dict[int, Tensor]:
        """Return the last forward pass's decisions by layer, [B, 1] or [B, T], 1 = run; of experts
        the share of a token's that ran."""
        return {layer: decision.per_token() for layer, decision in self.decisions().items()}

    def capacity(self) -> float:
        """Return the fraction of real units that ran in the last forward pass, over all routed
        layers."""
        decisions = self.state.decisions_of(self.layers)
        kept = sum(float(decision.kept().detach()) for decision in decisions)
        return kept / max(sum(float(decision.units()) for decision in decisions), 1.0)

    # -- settings

    def configure(self, config: RoutingConfig) -> None:
        """Take over thresholds (and budget) of `config`, as fresh routers would have them.

        Raises ConfigError when it has another number of thresholds than there are routed layers.
        """
        self.thresholds.configure(config)
        self.config = config

    def set_capacity(self, capacity: float) -> None:
        """Move the threshold to where calibration text kept `capacity`, one of config.calibrated.

        For inference; raises ConfigError for a capacity that was not calibrated.
        """
        self.configure(self.config.at_capacity(capacity))
