"""Work of the first rank alone, whose result or error all ranks get."""

from collections.abc import Callable
from typing import TypeVar

from megaskip.errors import MegaskipError
from megaskip.parallel.collectives import broadcast_from_first_rank
from megaskip.parallel.topology import Topology

T = TypeVar("T")


def on_first_rank(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result everywhere. Collective.

    A MegaskipError or OSError of rank 0 is raised on every rank, so that none waits for another.
    """
    outcome: object = None
    if topology.is_first:
        try:
            outcome = action()
        except (MegaskipError, OSError) as error:
            outcome = error if isinstance(error, MegaskipError) else MegaskipError(str(error))
    outcome = broadcast_from_first_rank(outcome)
    if isinstance(outcome, MegaskipError):
        raise outcome
    return outcome  # type: ignore[return-value]
