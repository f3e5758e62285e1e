"""The routers of one model in one place, and what they decided in the last forward pass.

Shapes: B rows, T tokens, D hidden, U units of decision in a row.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.config import RouterConfig
from megaskip.errors import ConfigError
from megaskip.routing.any_budget import AnyBudget
from megaskip.routing.budget import Budget, Measured, layer_hinge
from megaskip.routing.counts import Counts
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import DenseExecutor, Executor
from megaskip.routing.gate import Gate
from megaskip.routing.pooling import Pooling
from megaskip.routing.turn import Turn

PREFIX = "skip_routers"
_MLP_WIDTH = 16
_FAR = 30.0
"""Logit of a threshold above every score, or with its sign turned below: float64 still holds its
sigmoid apart from 1."""


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


class AffineRouter(Router):
    """A linear router with a bias, float32 [1], zero at the start."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__(hidden_size, device=device)
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, U] of features float32 [B, U, D], on their device."""
        return super().forward(features) + self.bias.to(features.device, torch.float32)


class MlpRouter(Router):
    """A router with one hidden layer: `inner` float32 [16, D], and on top the weight, [1, 16]."""

    def __init__(self, hidden_size: int, *, device: torch.device | None = None) -> None:
        super().__init__(_MLP_WIDTH, device=device)
        # The same on every rank, whatever its random state is.
        generator = torch.Generator().manual_seed(0)
        inner = torch.randn(_MLP_WIDTH, hidden_size, generator=generator) / math.sqrt(hidden_size)
        self.inner = nn.Parameter(inner.to(device=device, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, U] of features float32 [B, U, D], on their device."""
        inner = self.inner.to(features.device, torch.float32)
        return super().forward(nn.functional.silu(nn.functional.linear(features, inner)))


def make_router(kind: str, hidden_size: int, *, device: torch.device | None = None) -> Router:
    """Return a fresh router of a kind of RouterConfig.router."""
    kinds = {"linear": Router, "affine": AffineRouter, "mlp": MlpRouter}
    return kinds[kind](hidden_size, device=device)


class RouterSet(nn.Module):
    """All routers of a model, keyed by absolute layer index and target: "12.attn.weight" [1, D]
    float32.

    Registered on a model as `skip_routers`, or kept beside one that DeepSpeed shards. Before a
    forward pass `set_batch` tells it which tokens are real; plain calls of an attached model do so
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
        self.layers = tuple(layers)
        self.hidden_size = hidden_size
        self.turn = Turn()
        self.noise = 0.0
        self.temperature = 1.0
        self.configure(config)
        self.executor: Executor = DenseExecutor()
        self.held: Mapping[int, RoutingDecision] = {}
        self.gates = {layer: Gate(self, layer) for layer in self.layers}
        self._pooling: Pooling | None = None
        self._announced = False
        self._decisions: dict[int, RoutingDecision] = {}
        self._overrides: Mapping[int, Tensor | float] = {}
        for layer in self.layers:
            router = make_router(config.router, hidden_size, device=device)
            self.add_module(str(layer), nn.ModuleDict({config.target: router}))

    def __getstate__(self) -> dict[str, Any]:
        # A copy has made no forward pass; the tensors of one with gradient cannot be copied at all.
        return self.__dict__ | {"_decisions": {}, "held": {}, "_pooling": None, "_announced": False}

    # -- before the forward pass

    def set_batch(
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
        self.begin(self.pooling(token_mask, prompt_mask, segment_ids), announced=True)

    def pooling(
        self, token_mask: Tensor, prompt_mask: Tensor | None, segment_ids: Tensor | None
    ) -> Pooling:
        """Return what each decision about such a batch looks at; arguments as in `set_batch`."""
        if self.config.unit == "token":
            return Pooling.tokens(token_mask)
        pooled = token_mask if prompt_mask is None or self.config.pool == "all" else prompt_mask
        return Pooling.sequences(pooled, token_mask, segment_ids)

    def begin(
        self,
        pooling: Pooling | None,
        held: Mapping[int, RoutingDecision] | None = None,
        *,
        announced: bool = False,
    ) -> None:
        """Start a forward pass, or its recomputation: forget the last one's decisions; `held` ones
        are used instead of new ones. An `announced` pass is not described again by its inputs."""
        self._pooling = pooling
        self._decisions = {}
        self.held = held or {}
        self._announced = announced

    @property
    def current_pooling(self) -> Pooling | None:
        """Return what this forward pass decides about; None where held decisions are used."""
        return self._pooling

    def take_announcement(self) -> bool:
        """Return whether the coming forward pass was announced, and use the announcement up."""
        announced, self._announced = self._announced, False
        return announced

    @contextlib.contextmanager
    def override(self, keep: Mapping[int, Tensor | float]) -> Iterator[None]:
        """Decide in here as `keep` says, by layer: a number, or a tensor [B, U]; 1 = run.

        Layers that it does not name decide as they did outside, by an outer override or by
        themselves. For probes, benchmarks and baselines; the router still has its straight-through
        gradient.
        """
        before = self._overrides
        self._overrides = {**before, **keep}
        try:
            yield
        finally:
            self._overrides = before

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which everything runs: the unrouted base model."""
        return self.override(dict.fromkeys(self.layers, 1.0))

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
        kept = torch.stack([decision.kept() for decision in decisions])
        units = torch.stack([decision.units() for decision in decisions])
        return self.budget.penalty(kept, units, units.sum() if total_units is None else total_units)

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

    def counts(self, layers: Sequence[int] | None = None) -> Counts:
        """Return the sums over the last forward pass's units, of `layers` (all routed ones without
        it)."""
        return Counts.of(self._require_decisions(layers))

    # -- between the stages of a pipeline

    def carry(self) -> Tensor | None:
        """Return all decisions so far, float32 [n, B, U] in the order of the layers, with gradient.

        What a stage hands on with its hidden states: n layers up to and with its own; None
        without any.
        """
        keeps = [decision.keep for decision in self.decisions().values()]
        return torch.stack(keeps) if keeps else None

    def receive(self, keep: Tensor) -> None:
        """Take over what the stages below decided, float32 [n, B, U]: the first n routed layers'.

        Call it between `set_batch` and the forward pass. Their penalty and shares are then computed
        here, and the penalty's gradient returns through `keep`; their logits stay where they were
        made.
        """
        pooling = self._pooling
        assert pooling is not None, "set_batch() comes before receive()"
        for layer, one in zip(self.layers, keep, strict=False):
            decision = RoutingDecision(
                logit=one.detach(),
                keep=one,
                unit_mask=pooling.unit_mask,
                unit_of_token=pooling.unit_of_token,
            )
            self.record(layer, decision)

    def steer(self, measured: Measured | None = None, *, progress: float | None = None) -> None:
        """Steer towards the asked capacity after an optimizer step (budget="global").

        `measured` is what the global batch did, the same on every rank; the last forward pass
        without it. `progress` is the share of the run that is done: the target then falls
        gradually.
        """
        if self.config.budget == "global":
            self.budget.steer(measured or Measured.of(self.counts()), progress)

    def settled_config(self) -> RouterConfig:
        """Return the configuration with the threshold where steering has put it."""
        offset = self.budget.settled_offset()
        if not offset:
            return self.config
        moved = [_score(logit + offset) for logit in self.threshold_logits.values()]
        alike = isinstance(self.config.threshold, float)
        return dataclasses.replace(self.config, threshold=moved[0] if alike else tuple(moved))

    def set_capacity(self, capacity: float) -> None:
        """Move the threshold to where calibration text kept `capacity`, one of config.calibrated.

        For inference; raises ConfigError for a capacity that was not calibrated.
        """
        self.configure(self.config.at_capacity(capacity))

    def place(self, logits: Sequence[float]) -> None:
        """Put the threshold of each routed layer, in their order, at so many logits; infinite for
        all or none."""
        self.configure(dataclasses.replace(self.config, threshold=tuple(map(_score, logits))))

    def configure(self, config: RouterConfig) -> None:
        """Take over thresholds and budget of `config`, as a fresh set would have them.

        Raises ConfigError when it has another number of thresholds than there are routed layers.
        """
        given = config.threshold
        thresholds = [given] * len(self.layers) if isinstance(given, float) else given
        if len(thresholds) != len(self.layers):
            raise ConfigError(
                f"threshold holds {len(thresholds)} numbers for {len(self.layers)} routed layers"
            )
        self.config = config
        self.threshold_logits = {
            layer: _logit(one) for layer, one in zip(self.layers, thresholds, strict=True)
        }
        self.budget = _budget(config)

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
                f"layers see {(batch, tokens)}; call set_batch() with the masks of this very batch"
            )
        return pooling

    def overridden(self, layer: int, keep: Tensor) -> Tensor:
        """Return `keep` with the values that override the layer, if any; the gradient stays."""
        if layer not in self._overrides:
            return keep
        value = torch.as_tensor(self._overrides[layer], dtype=torch.float32, device=keep.device)
        value = value.expand_as(keep)
        return value + (keep - keep.detach()) if keep.requires_grad else value

    def disturbed(self, logit: Tensor) -> Tensor:
        """Return the logits [B, U] with logistic noise, `noise` spreads wide, as training may
        ask."""
        if not self.noise:
            return logit
        uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
        # A logistic variable has a standard deviation of pi / sqrt(3).
        scale = self.noise * self.budget.spread * math.sqrt(3) / math.pi
        return logit + scale * torch.logit(uniform)

    def record(self, layer: int, decision: RoutingDecision) -> None:
        """Note a layer's decision; a recomputation in the backward pass does not overwrite it."""
        self._decisions.setdefault(layer, decision)

    def _require_decisions(self, layers: Sequence[int] | None = None) -> list[RoutingDecision]:
        layers = self.layers if layers is None else layers
        missing = [layer for layer in layers if layer not in self._decisions]
        if missing:
            raise RuntimeError(f"no forward pass has gone through the routed layers {missing} yet")
        return [self._decisions[layer] for layer in layers]


def _budget(config: RouterConfig) -> Budget:
    if config.capacity_low is None:
        return Budget(target=config.capacity, gain=config.penalty_weight)
    return AnyBudget(asked=config.capacity, low=config.capacity_low, gain=config.penalty_weight)


def _logit(score: float) -> float:
    return math.log(score / (1 - score))


def _score(logit: float) -> float:
    return 1 / (1 + math.exp(-min(max(logit, -_FAR), _FAR)))
