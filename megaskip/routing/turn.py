"""Threads that share a model take turns."""

import threading


class Turn:
    """Lets one thread at a time through a model, for a forward pass keeps its decisions there.

    A thread may begin again before it ends; a copy is free.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def begin(self) -> None:
        """Wait until no other thread is inside."""
        self._lock.acquire()

    def end(self) -> None:
        """Let the next one in."""
        self._lock.release()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        return Turn, ()
