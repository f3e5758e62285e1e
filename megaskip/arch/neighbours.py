"""The ties between the stages of a model in inference, with generate() and cache.

Hidden states, what routed layers decided and, where they are wanted by all, logits go from stage to
stage. Knows modules, not ranks.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.elsewhere import LayerElsewhere
from megaskip.arch.stage import LayerRange
from megaskip.routing import Routers
from megaskip.routing.handover import carried_keep, receive_keep


class Neighbours(Protocol):
    """The way to the processes that hold the other stages."""

    shares_logits: bool
    """Whether the last stage's logits are wanted by all, as in generation; scoring needs them
    there."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send to the stage above."""
        ...

    def receive(self, tensors: list[Tensor]) -> list[Tensor]:
        """Fill tensors with what the stage below sent, and return them."""
        ...

    def spread(self, logits: Tensor) -> None:
        """Send logits to all other stages; the last stage calls it."""
        ...

    def take(self, logits: Tensor) -> Tensor:
        """Fill `logits` with what the last stage spreads, and return them."""
        ...


def connect(
    model: Any, layers: LayerRange, routers: Routers | None, neighbours: Neighbours
) -> None:
    """Tie a model that was cut to its other stages: hidden states and decisions come in below its
    layers and go out above.

    Routers are attached before: unconnected, the model runs by itself. From then on every stage has
    to call the model, with the same inputs.
    """
    parts = find_decoder(model)
    routed_below = 0 if routers is None else sum(layer < layers.first for layer in routers.layers)

    def enter(hidden_states: Tensor) -> Tensor:
        memory = [torch.empty_like(hidden_states, memory_format=torch.contiguous_format)]
        pooling = routers.state.pooling if routers is not None and routed_below else None
        if pooling is not None:
            shape = (routed_below, *pooling.unit_mask.shape)
            memory.append(torch.empty(shape, dtype=torch.float32, device=hidden_states.device))
        arrived, *keep = neighbours.receive(memory)
        if keep and routers is not None:
            receive_keep(routers, keep[0])
        return arrived

    def leave(hidden_states: Tensor) -> Tensor:
        leaving = [hidden_states]
        # Decisions of the cache, in decode, are in the cache of every stage.
        if routers is not None and routers.state.pooling is not None:
            keep = carried_keep(routers)
            leaving += [] if keep is None else [keep]
        neighbours.send(leaving)
        return hidden_states

    def spread(module: nn.Module, args: Any, logits: Tensor) -> None:
        if neighbours.shares_logits:
            neighbours.spread(logits)

    def fetch(logits: Tensor) -> Tensor:
        return neighbours.take(logits) if neighbours.shares_logits else logits[..., :0]

    if not layers.is_first:
        _elsewhere(parts.layers[layers.first - 1]).pass_on = enter
    head = model.get_output_embeddings()
    if layers.is_last:
        head.register_forward_hook(spread)
    else:
        head.fetch = fetch
        _elsewhere(parts.layers[layers.stop]).pass_on = leave


def _elsewhere(layer: nn.Module) -> LayerElsewhere:
    assert isinstance(layer, LayerElsewhere), "cut() comes before connect()"
    return layer
