"""What one forward pass is told, and what it decides. Knows no model and no parameters.

Shapes: B rows, T tokens, D hidden, U units of decision in a row.
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megaskip.routing.decision import RoutingDecision
from megaskip.routing.executor import Executor
from megaskip.routing.pooling import Pooling


class RoutingState:
    """One forward pass of a model: its executor, pooling, overrides and decisions."""

    def __init__(self, executor: Executor, unit: str, choices: int = 1) -> None:
        told = {"executor": executor, "unit": unit, "choices": choices, "overrides": {}}
        self.__setstate__(told)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has made no forward pass: neither decisions with gradient nor locks can be copied.
        return {name: getattr(self, name) for name in ("executor", "unit", "choices", "overrides")}

    def __setstate__(self, copied: dict[str, Any]) -> None:
        self.executor: Executor = copied["executor"]
        self.unit: str = copied["unit"]
        """What a decision covers: sequence or token."""
        self.choices: int = copied["choices"]
        """Decisions about each token: more than one where its experts are decided about."""
        self.overrides: Mapping[int, Tensor | float] = copied["overrides"]
        self.lock = threading.RLock()
        """Lets one thread at a time through the model, for decisions of a forward pass lie here."""
        self.begin(None)

    # -- what the pass is told

    def begin(
        self,
        pooling: Pooling | None,
        cached: Mapping[int, RoutingDecision] | None = None,
        *,
        described: bool = False,
    ) -> None:
        """Start a forward pass, or its recomputation, and forget the last one's decisions.

        `cached` decisions, of the KV cache, are used instead of new ones. A pass that is
        `described` beforehand is not described again by the model's inputs.
        """
        self.pooling = pooling
        self.cached = cached or {}
        self.decisions: dict[int, RoutingDecision] = {}
        self.ahead: dict[int, RoutingDecision] = {}
        """Of layers that are still to come, where the first one decides for all."""
        self._described = described

    def take_description(self) -> bool:
        """Return whether the coming pass was described beforehand; the next one then is not."""
        described, self._described = self._described, False
        return described

    def pooling_for(self, hidden_states: Tensor) -> Pooling:
        """Return the pooling of this pass, or one that takes every token of [B, T, D] for real.

        Raises ValueError when the pass was described with another shape.
        """
        batch, tokens = hidden_states.shape[:2]
        pooling = self.pooling
        if pooling is None:
            everything = torch.ones(batch, tokens, dtype=torch.bool, device=hidden_states.device)
            return Pooling.of(self.unit, everything, choices=self.choices)
        if pooling.shape != (batch, tokens):
            raise ValueError(
                f"set_batch() was given masks of {pooling.shape} (rows, tokens), but the layers "
                f"see {(batch, tokens)}; call it with the masks of this very batch"
            )
        return pooling

    def pooling_for_flat(self, hidden_states: Tensor) -> Pooling:
        """Return `pooling_for` the tokens of hidden states [N, D] that are without their rows."""
        rows = 1 if self.pooling is None else self.pooling.shape[0]
        if len(hidden_states) % rows:
            rows = 1
        return self.pooling_for(hidden_states.view(rows, -1, hidden_states.shape[-1]))

    # -- what is decided

    @contextlib.contextmanager
    def override(self, keep: Mapping[int, Tensor | float]) -> Iterator[None]:
        """Decide in here as `keep` says; see Routers.override."""
        before = self.overrides
        self.overrides = {**before, **keep}
        try:
            yield
        finally:
            self.overrides = before

    def overridden(self, layer: int, keep: Tensor) -> Tensor:
        """Return `keep` [B, U] with the values that override the layer, if any; the gradient
        stays."""
        if layer not in self.overrides:
            return keep
        value = self.overrides[layer]
        if not isinstance(value, Tensor):  # a copy from the host would be waited for
            value = torch.full_like(keep, value, requires_grad=False)
        value = value.to(dtype=torch.float32, device=keep.device).expand_as(keep)
        return value + (keep - keep.detach()) if keep.requires_grad else value

    def record(self, layer: int, decision: RoutingDecision) -> None:
        """Note a layer's decision; a recomputation in the backward pass does not overwrite it."""
        self.decisions.setdefault(layer, decision)

    def decisions_of(self, layers: Sequence[int]) -> list[RoutingDecision]:
        """Return the decisions of `layers`, in their order; raises RuntimeError when one is
        missing."""
        missing = [layer for layer in layers if layer not in self.decisions]
        if missing:
            raise RuntimeError(f"no forward pass has gone through the routed layers {missing} yet")
        return [self.decisions[layer] for layer in layers]
