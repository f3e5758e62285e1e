"""Ranks that work on batches together: the first one asks, all of them answer.

Which batches there are does not depend on how many ranks there are, so neither do the answers.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megaskip.errors import MegaskipError
from megaskip.evaluation.runner import Runner
from megaskip.parallel.collectives import broadcast_from_first_rank
from megaskip.progress import progress_bar

Handler = Callable[[Any], Any]


class RankPool:
    """The ranks of an evaluation; alone without a process group."""

    def __init__(self, runner: Runner, handlers: dict[str, Handler]) -> None:
        self._runner, self._handlers = runner, handlers
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self.is_first = self._world == 1 or dist.get_rank() == 0

    def run(self, kind: str, batches: list[Any], *, sizes: list[int] | None = None) -> list[Any]:
        """Return the handler's answers to `batches`, in order. The first rank calls it.

        `sizes` are the requests in each batch, for the progress bar.
        """
        self._tell((kind, batches))
        return self._answer(kind, batches, sizes or [1] * len(batches))

    def serve(self) -> None:
        """Answer until the first rank is done. Every other rank calls it.

        Raises the MegaskipError that the first rank ended with, if any.
        """
        while True:
            message: Any = broadcast_from_first_rank(None)
            if isinstance(message, MegaskipError):
                raise message
            if message is None:
                return
            kind, batches = message
            self._answer(kind, batches, [1] * len(batches))

    def dismiss(self, error: MegaskipError | None = None) -> None:
        """Let the other ranks go, with the error that ends the evaluation, if any."""
        self._tell(error)

    def _tell(self, message: Any) -> None:
        broadcast_from_first_rank(message)

    def _answer(self, kind: str, batches: list[Any], sizes: list[int]) -> list[Any]:
        runner, handler = self._runner, self._handlers[kind]
        done: dict[int, Any] = {}
        with progress_bar(
            total=sum(sizes), desc=kind, disable=None if self.is_first else True
        ) as bar:
            for turn in range(0, len(batches), runner.shares):
                mine = turn + runner.share
                if mine < len(batches):
                    answer = handler(batches[mine])
                    if runner.answers:
                        done[mine] = answer
                elif runner.lock_step:
                    # The others gather weights: this rank takes part, and forgets the answer.
                    handler(batches[-1])
                bar.update(sum(sizes[turn : turn + runner.shares]))
        if self._world == 1:
            return [done[index] for index in range(len(batches))]
        everywhere: list[Any] = [None] * self._world
        dist.gather_object(done, everywhere if self.is_first else None, dst=0)
        merged: dict[int, Any] = {}
        for of_rank in everywhere:
            merged |= of_rank or {}
        return [merged[index] for index in range(len(batches))] if self.is_first else []
