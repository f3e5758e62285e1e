"""Ranks that must not drift apart: what the first rank does or fails at, all ranks learn."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megaskip.errors import MegaskipError
from megaskip.parallel.topology import Topology

T = TypeVar("T")


def on_first_rank(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result everywhere. Collective.

    A MegaskipError or OSError of rank 0 is raised on every rank, so that none waits for another.
    """
    outcome: list[object] = [None]
    if topology.is_first:
        try:
            outcome = [action()]
        except (MegaskipError, OSError) as error:
            outcome = [error if isinstance(error, MegaskipError) else MegaskipError(str(error))]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], MegaskipError):
        raise outcome[0]
    return outcome[0]  # type: ignore[return-value]
