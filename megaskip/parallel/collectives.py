"""Collectives of the default process group. A process without one is alone: they change nothing.

So the engine trains, evaluates and calibrates in a notebook, too.
"""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def sum_over_ranks(tensor: Tensor) -> None:
    """Replace `tensor` by its sum over the ranks, in place. Collective."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def gather_from_ranks(mine: T) -> list[T]:
    """Return what each rank passed, in the order of the ranks; it is pickled. Collective."""
    if not dist.is_initialized():
        return [mine]
    everywhere: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return everywhere


def broadcast_from_first_rank(value: T) -> T:
    """Return what the first rank passed; it is pickled. Collective."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
