"""The routers of one model in one place, and what they decided in the last forward pass.

Shapes: B rows, T tokens, D hidden, U units of decision in a row.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megaskip.config import RouterConfig
from megaskip.routing.budget import Budget, Measured, layer_hinge
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.flow import DenseFlow, Flow
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling

PREFIX = "skip_routers"


class Router(nn.Module):
    """A linear router, one score a unit (paper section 3): weight float32 [1, D], zero at the
    start."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, U] of features float32 [B, U, D], on their device."""
        weight = self.weight.to(device=features.device, dtype=torch.float32)
        return nn.functional.linear(features, weight).squeeze(-1)


class RouterSet(nn.Module):
    """All routers of a model, keyed by absolute layer index and target: "12.attn.weight" [1, D]
    float32.

    Registered on a model as `skip_routers`, or kept beside one that DeepSpeed shards. Before a
    forward pass `announce` tells it which tokens are real; plain calls of an attached model do so
    by themselves.
    """

    def __init__(
        self,
        config: RouterConfig,
        layers: Sequence[int],
        hidden_size: int,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(layers)
        self.base_threshold_logit = math.log(config.threshold / (1 - config.threshold))
        self.budget = Budget(target=config.capacity, gain=config.penalty_weight)
        self.flow: Flow = DenseFlow()
        self.held: Mapping[int, RoutingDecision] = {}
        self.gates = {layer: Gate(self, layer) for layer in self.layers}
        self._pooling: Pooling | None = None
        self._announced = False
        self._decisions: dict[int, RoutingDecision] = {}
        self._forced: Mapping[int, Tensor | float] = {}
        for layer in self.layers:
            router = Router(hidden_size, device=device)
            self.add_module(str(layer), nn.ModuleDict({config.target: router}))

    # -- before the forward pass

    def announce(
        self,
        token_mask: Tensor,
        prompt_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> None:
        """Say what the next forward pass holds: a sublayer cannot see padding by itself.

        `token_mask` bool [B, T] marks real tokens; `prompt_mask` bool [B, T] those that a sequence
        is judged by under pool="prompt" (all real ones without it); `segment_ids` int64 [B, T] the
        segments of packed rows (padding -1). The announcement holds for one forward pass.
        """
        if self.config.unit == "token":
            pooling = Pooling.tokens(token_mask)
        else:
            pooled = token_mask if prompt_mask is None or self.config.pool == "all" else prompt_mask
            pooling = Pooling.sequences(pooled, token_mask, segment_ids)
        self.begin(pooling)
        self._announced = True

    def begin(
        self, pooling: Pooling | None, held: Mapping[int, RoutingDecision] | None = None
    ) -> None:
        """Start a forward pass: forget the last one's decisions; `held` ones are used instead of
        new ones."""
        self._pooling = pooling
        self._decisions = {}
        self.held = held or {}

    def take_announcement(self) -> bool:
        """Return whether the coming forward pass was announced, and use the announcement up."""
        announced, self._announced = self._announced, False
        return announced

    def force(self, keep: Mapping[int, Tensor | float]) -> None:
        """Override decisions from now on, per layer (a number, or a tensor [B, U]); an empty
        mapping ends it.

        For probes, benchmarks and baselines. The router still has its straight-through gradient.
        """
        self._forced = keep

    # -- after it

    def keep(self) -> dict[int, Tensor]:
        """Return the last forward pass's decisions by layer, [B, 1] or [B, T], 1 = run."""
        return {layer: decision.per_token() for layer, decision in sorted(self._decisions.items())}

    def decisions(self) -> dict[int, RoutingDecision]:
        """Return the last forward pass's decisions by layer, with logits and units."""
        return dict(sorted(self._decisions.items()))

    def penalty(self, total_units: float | None = None) -> Tensor:
        """Return the capacity penalty of the last forward pass, a float32 scalar with gradient.

        budget="global" divides by `total_units`, the routed units of the whole global batch (those
        of this forward pass without it), so that the penalties of all micro-batches and ranks add
        up to the global one. budget="layer" is the published hinge of this forward pass (paper
        equations 9 and 10).
        """
        decisions = self._require_decisions()
        if self.config.budget == "layer":
            return layer_hinge(decisions, self.config.capacity, self.config.penalty_weight)
        kept = torch.stack([decision.kept() for decision in decisions]).sum()
        units = torch.stack([decision.units() for decision in decisions]).sum()
        return self.budget.penalty(kept, units, units if total_units is None else total_units)

    def capacity(self) -> float:
        """Return the fraction of real units that ran in the last forward pass, over all routed
        layers."""
        decisions = self._require_decisions()
        kept = sum(float(decision.kept().detach()) for decision in decisions)
        return kept / max(sum(float(decision.units()) for decision in decisions), 1.0)

    def shares(self) -> Tensor:
        """Return float64 [B]: the share of units that ran in each row of the last forward pass."""
        decisions = self._require_decisions()
        kept = torch.stack([(d.keep.detach() * d.unit_mask).sum(1) for d in decisions]).sum(0)
        units = torch.stack([d.unit_mask.sum(1) for d in decisions]).sum(0)
        return kept.double() / units.clamp(min=1)

    def counts(self) -> Tensor:
        """Return float64 [4, R] sums over the last forward pass's units, by routed layer.

        Units kept, units seen, logits, squared logits. Sums of ranks and micro-batches add up.
        """
        columns = []
        for decision in self._require_decisions():
            logit = decision.logit.detach().double() * decision.unit_mask
            kept, units = decision.kept().detach(), decision.units()
            columns.append(torch.stack([kept.double(), units, logit.sum(), logit.square().sum()]))
        return torch.stack(columns, dim=1)

    def steer(self, measured: Measured | None = None, *, progress: float | None = None) -> None:
        """Steer towards the asked capacity after an optimizer step (budget="global").

        `measured` is what the global batch did, the same on every rank; the last forward pass
        without it. `progress` is the share of the run that is done: the target then falls
        gradually.
        """
        if self.config.budget == "global":
            self.budget.steer(measured or Measured.of(*self.counts().sum(1).tolist()), progress)

    def settled_config(self) -> RouterConfig:
        """Return the configuration with the threshold where steering has put it."""
        if not self.budget.offset:
            return self.config
        logit = self.base_threshold_logit + self.budget.offset
        return dataclasses.replace(self.config, threshold=1 / (1 + math.exp(-logit)))

    # -- for gates

    def router(self, layer: int) -> Router:
        """Return the router of a layer."""
        return self.get_submodule(f"{layer}.{self.config.target}")  # type: ignore[return-value]

    def pooling_for(self, hidden_states: Tensor) -> Pooling:
        """Return the announced pooling, or one that takes every token of [B, T, D] for real."""
        batch, tokens = hidden_states.shape[:2]
        pooling = self._pooling
        if pooling is None:
            everything = torch.ones(batch, tokens, dtype=torch.bool, device=hidden_states.device)
            if self.config.unit == "token":
                return Pooling.tokens(everything)
            return Pooling.sequences(everything, everything)
        width = pooling.unit_mask.shape if pooling.weights is None else pooling.weights.shape[::2]
        if tuple(width) != (batch, tokens):
            raise ValueError(
                f"the batch announced to the routers is {tuple(width)} (rows, tokens), but the "
                f"layers see {(batch, tokens)}; call announce() with the masks of this very batch"
            )
        return pooling

    def forced(self, layer: int, keep: Tensor) -> Tensor:
        """Return `keep` with the forced values of the layer, if any; the gradient stays."""
        if layer not in self._forced:
            return keep
        value = torch.as_tensor(self._forced[layer], dtype=torch.float32, device=keep.device)
        value = value.expand_as(keep)
        return value + (keep - keep.detach()) if keep.requires_grad else value

    def record(self, layer: int, decision: RoutingDecision) -> None:
        """Note a layer's decision; a recomputation in the backward pass does not overwrite it."""
        self._decisions.setdefault(layer, decision)

    def _require_decisions(self) -> list[RoutingDecision]:
        missing = [layer for layer in self.layers if layer not in self._decisions]
        if missing:
            raise RuntimeError(f"no forward pass has gone through the routed layers {missing} yet")
        return [self._decisions[layer] for layer in self.layers]
