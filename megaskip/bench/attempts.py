"""Runs by name of which one may be too large: it is left out, and the others go on."""

import math
from collections.abc import Callable, Hashable
from typing import Generic

import torch

from megaskip.bench.memory import free
from megaskip.bench.timing import Name, Sample

OUT_OF_MEMORY = "out of memory"


class Attempts(Generic[Name]):
    """Calls `prepare` before the first run of each name, then `run`; keeps out what runs out of
    memory. The `base` may not: its torch.OutOfMemoryError is raised."""

    def __init__(
        self, run: Callable[[Name], Sample], prepare: Callable[[Name], object], base: Name
    ) -> None:
        self.failed: set[Hashable] = set()
        self._ready: set[Hashable] = set()
        self._run, self._prepare, self._base = run, prepare, base
        self._nothing: Sample = (math.nan,)

    def __call__(self, name: Name) -> Sample:
        """Return the seconds of one run; nan for a name that has run out of memory."""
        if name not in self.failed:
            try:
                if name not in self._ready:
                    self._prepare(name)
                    self._ready.add(name)
                return self._run(name)
            except torch.OutOfMemoryError:
                if name == self._base:
                    raise
                self.failed.add(name)
            free()  # outside the handler, whose traceback holds the tensors
        return self._nothing
