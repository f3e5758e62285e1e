"""Work of the first rank alone, or of each, whose errors all ranks get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from megaskip.errors import MegaskipError
from megaskip.parallel.collectives import broadcast_from_first_rank, gather_from_ranks
from megaskip.parallel.topology import Topology

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt(Generic[T]):
    """What became of work of the first rank; empty on the others."""

    value: T | None = None
    error: MegaskipError | None = None

    def shared(self) -> T:
        """Return the first rank's value, or raise its error, on every rank. Collective."""
        first = broadcast_from_first_rank(self)
        if first.error is not None:
            raise first.error
        return first.value  # type: ignore[return-value]


def attempt_on_first_rank(topology: Topology, action: Callable[[], T]) -> Attempt[T]:
    """Run `action` on rank 0, before there is a process group; `shared` tells the others in it.

    A MegaskipError or OSError is kept until then, so that no rank waits for one that is gone; a
    process that is alone raises it at once.
    """
    if not topology.is_first:
        return Attempt()
    try:
        return Attempt(value=action())
    except (MegaskipError, OSError) as error:
        problem = error if isinstance(error, MegaskipError) else MegaskipError(str(error))
    if topology.world_size == 1:
        raise problem
    return Attempt(error=problem)


def on_first_rank(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result everywhere. Collective.

    A MegaskipError or OSError of rank 0 is raised on every rank, so that none waits for another.
    """
    attempt = attempt_on_first_rank(topology, action)
    return attempt.value if topology.world_size == 1 else attempt.shared()  # type: ignore[return-value]


def on_every_rank(topology: Topology, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result. Collective.

    A MegaskipError of a rank is raised on all of them, so that none waits for another. `action`
    must not communicate: ranks that wait in it for one that has failed would never come here.
    """
    if topology.world_size == 1:
        return action()
    problem: MegaskipError | None = None
    try:
        result = action()
    except MegaskipError as error:
        problem = error
    problems = [error for error in gather_from_ranks(problem) if error is not None]
    if problems:
        raise problems[0]
    return result
