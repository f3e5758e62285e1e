"""What skipping costs each unit of decision, in nats: for all routed layers at once, by gradients.

Many layers skip together in the end, so costs are measured that way, too: the routed layers are
dealt into groups, the gates of a group go from running to skipping together while all other layers
run, and the gradient of the loss with respect to each gate, integrated along this way, is the
unit's share of what the group costs (the shares add up to it: Aumann and Shapley's values). Each
row stands at another point of the way, so that a batch samples all of it: some costs show only near
its end, such as those of the first token's huge activations, which half an update still brings
about.
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
    seed: int,
) -> None:
    """Tell `observe` the costs of all units of a batch, of the layers that are on this rank: a
    forward and a backward pass for each of `groups` of layers.

    `distill` is the share of each label that is the dense model's prediction, `seed` that of the
    points at which rows stand. A rank without a batch takes part with None. Collective.
    """
    rows = 1 if batch is None else len(batch.input_ids)
    at = points_on_the_way(rows, seed)
    with contextlib.closing(engine.gate_gradients(batch, groups, at=at, distill=distill)) as passes:
        for group in groups:
            # Of these layers alone: what all routers of a large model read is gigabytes.
            with read_by_routers(engine.routers, group) as read:
                real, gradients = next(passes)
            if batch is not None:
                for layer, gradient in gradients.items():
                    observe(layer, read[layer][real], -gradient[real])


def points_on_the_way(rows: int, seed: int) -> Tensor:
    """Return a random point in each of `rows` equal shares of [0, 1], in random order, float32
    [B, 1]."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.randperm(rows, generator=generator) + torch.rand(rows, generator=generator)
    return (shares / rows).unsqueeze(1)


def deal_groups(layers: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Return `layers` dealt into `count` groups at random, the same on every rank."""
    shuffled = random.Random(seed).sample(list(layers), len(layers))
    return [group for first in range(count) if (group := shuffled[first::count])]


@contextlib.contextmanager
def read_by_routers(routers: RouterSet, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hold a dict that gets what each router of `layers` reads in a forward pass, float32 [B, U,
    D]; a recomputation in the backward pass writes the same."""
    read: dict[int, Tensor] = {}

    def listen(layer: int) -> RemovableHandle:
        def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[layer] = inputs[0].detach()

        return routers.router(layer).register_forward_pre_hook(note)

    handles = [listen(layer) for layer in layers]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()
