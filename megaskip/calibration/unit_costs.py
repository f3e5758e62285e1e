"""What skipping costs each unit of decision, in nats: for all routed layers at once, by gradients.

Many layers skip together in the end, so costs are measured that way, too: the routed layers are
dealt into groups, the gates of a group go from running to skipping together while all other layers
run, and the gradient of the loss with respect to each gate, integrated along this way, is the
unit's share of what the group costs (the shares add up to it: Aumann and Shapley's values). One
point half the way is exact for a loss that is quadratic along it.
Shapes: B rows, U units of decision in a row, D hidden.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megaskip.data import Batch
from megaskip.parallel.engine import Engine
from megaskip.routing import RouterSet

_HALF_WAY = 0.5

Observer = Callable[[int, Tensor, Tensor], object]
"""Called with a layer, what its router reads of each real unit, float32 [N, D], and what skipping
these units costs, float32 [N], nats."""


def measure_costs(
    engine: Engine,
    batch: Batch | None,
    groups: Sequence[Sequence[int]],
    observe: Observer,
    *,
    distill: float,
) -> None:
    """Tell `observe` the costs of all units of a batch, of the layers that are on this rank: a
    forward and a backward pass for each of `groups` of layers.

    `distill` is the share of each label that is the dense model's prediction. A rank without a
    batch takes part with None. Collective.
    """
    passes = engine.gate_gradients(batch, groups, at=_HALF_WAY, distill=distill)
    with read_by_routers(engine.routers) as read:
        for real, gradients in passes:
            if batch is not None:
                for layer, gradient in gradients.items():
                    observe(layer, read[layer][real], -gradient[real])


def deal_groups(layers: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Return `layers` dealt into `count` groups at random, the same on every rank."""
    shuffled = random.Random(seed).sample(list(layers), len(layers))
    return [group for first in range(count) if (group := shuffled[first::count])]


@contextlib.contextmanager
def read_by_routers(routers: RouterSet) -> Iterator[dict[int, Tensor]]:
    """Hold a dict that gets what each router reads in a forward pass, float32 [B, U, D]; a
    recomputation in the backward pass writes the same."""
    read: dict[int, Tensor] = {}

    def listen(layer: int) -> RemovableHandle:
        def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[layer] = inputs[0].detach()

        return routers.router(layer).register_forward_pre_hook(note)

    handles = [listen(layer) for layer in routers.layers]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
