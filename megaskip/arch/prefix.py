"""The layers in front of the first routed one, whose output no router changes: run by themselves,
or left out where their output is known. Knows modules, not files or ranks.

Shapes: B rows, T tokens, D hidden.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megaskip.arch.decoder import find_decoder
from megaskip.arch.elsewhere import LayerElsewhere
from megaskip.arch.task_loss import TaskLoss
from megaskip.errors import UnsupportedModelError

_TOLERANCE = 1e-5
"""Of the largest hidden state; the same kernels run, so the difference is zero."""


class FrozenPrefix:
    """The layers of a loss's model below layer `first`, which is above 0."""

    def __init__(self, loss: TaskLoss, first: int) -> None:
        assert first > 0, "there is nothing in front of layer 0"
        self.first = first
        self._loss = loss
        self._parts = find_decoder(loss.model)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Leave the other layers out in here, so that `states` runs these alone."""
        with self._elsewhere(range(self.first, len(self._parts.layers))):
            yield

    @torch.no_grad()
    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        lengths: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return the hidden states [B, T, D] in front of layer `first`; only in `alone`. Arguments
        as in TaskLoss. Under ZeRO-3 collective."""
        entering: list[Tensor] = []

        def note(hidden_states: Tensor) -> Tensor:
            entering.append(hidden_states)
            return hidden_states

        layer: Any = self._parts.layers[self.first]
        layer.pass_on = note
        self._loss.hidden_states(input_ids, attention_mask, position_ids, lengths=lengths)
        layer.pass_on = None
        (states,) = entering
        return states

    def leave_out(self) -> None:
        """Leave these layers out for good: from now on the loss wants their states, and what they
        took is free."""
        self._put_elsewhere(range(self.first))
        self._loss.first_layer = self.first

    @torch.no_grad()
    def verify(self, dtype: torch.dtype) -> None:
        """Raise UnsupportedModelError unless these layers' states are of type `dtype` and the other
        layers make of them what the model makes of token ids, on two short rows. Under ZeRO-3
        collective."""
        device = next(self._loss.parameters()).device
        ids = torch.arange(1, 17, device=device).reshape(2, 8)
        call = (ids, torch.ones_like(ids), torch.arange(8, device=device).expand(2, 8))
        truth = self._loss.hidden_states(*call)
        with self.alone():
            states = self.states(*call)
        if states.dtype != dtype:
            raise UnsupportedModelError(
                f"{self._parts.model_type}: its hidden states are {states.dtype}, expected {dtype} "
                "as its weights; they cannot be kept as they are: leave --cache_prefix out"
            )
        with self._elsewhere(range(self.first)):
            self._loss.first_layer = self.first
            error = (self._loss.hidden_states(*call, states) - truth).float().abs().max()
            self._loss.first_layer = 0
        # Written so that NaN fails too.
        if not float(error) <= _TOLERANCE * float(truth.abs().max()):
            raise UnsupportedModelError(
                f"{self._parts.model_type}: entered at layer {self.first}, it computes something "
                f"else than from its token ids (distance of hidden states {float(error):.1e}); "
                "leave --cache_prefix out"
            )

    @contextlib.contextmanager
    def _elsewhere(self, indices: range) -> Iterator[None]:
        layers = self._parts.layers
        before = {index: layers[index] for index in indices}
        self._put_elsewhere(indices)
        try:
            yield
        finally:
            for index, layer in before.items():
                layers[index] = layer

    def _put_elsewhere(self, indices: range) -> None:
        layers = self._parts.layers
        for index in indices:
            layers[index] = LayerElsewhere(layers[index], index)
