"""What a fit has done so far, in one file beside its output: one that was stopped goes on there.

The sums of all ranks are added up before they are written, and go on on the first rank alone, at
fixed numbers of batches. So a fit that was stopped ends with the same bits as one that was not.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaskip.checkpoint.atomic import write_errors, write_tensors
from megaskip.errors import CheckpointError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.collectives import sum_over_ranks
from megaskip.parallel.topology import Topology

logger = get_logger(__name__)

SAVED_EVERY = 32
"""Batches of each rank. A number and not a time: where sums are added up decides their last
bits."""
_NOTHING = "nothing"


class Regression(Protocol):
    """What adds up rows, of features that are chosen first where there are any."""

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """Return what is added up, to be changed in place."""
        ...

    @property
    def features(self) -> Tensor | None:
        """Return the features that are chosen; None before, or without."""
        ...


class FitProgress:
    """The state of one fit. Every rank has one; the first reads and writes the file."""

    def __init__(self, path: Path, settings: Mapping[str, Any], topology: Topology) -> None:
        """`settings` are what the numbers depend on. Raises CheckpointError when the file there is
        of other settings, or damaged. Collective."""
        self._path, self._topology = path, topology
        text = json.dumps(dict(settings), sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        stored = on_first_rank(topology, self._read_metadata)
        self.stage: str = stored.get("stage", "")
        """What the sums are of; "" where there are none."""
        self.batches: int = stored.get("batches", 0)
        """How many batches of each rank are in the sums."""
        self.losses: dict[tuple[int, ...], float] = {
            tuple(layers): loss for layers, loss in stored.get("losses", [])
        }
        """What was measured for the order: loss by dropped layers."""
        self.results: dict[str, Any] = stored.get("results", {})
        """What came of each step that is done, as JSON, by its name."""
        self._fitted: dict[str, Tensor] = {}
        """Of the steps that are done; written with whatever comes after them."""
        if stored:
            logger.info("goes on from %s: %s", path, self._describe())

    def restore_sums(self, regressions: Mapping[int, Regression]) -> None:
        """Copy the stored features into those of `regressions`, by layer, on every rank, and the
        sums into theirs on the first one. Collective."""
        if features := _features(regressions):
            self._restore(features, everywhere=True)
        self._restore(_sums(regressions), everywhere=False)

    def keep_sums(self, stage: str, batches: int, regressions: Mapping[int, Regression]) -> None:
        """Add the sums of all ranks up on the first one, and write them, with `batches` of each
        rank in them. Collective."""
        sums = _sums(regressions)
        for total in sums.values():
            sum_over_ranks(total)
            if not self._topology.is_first:
                total.zero_()
        self.stage, self.batches = stage, batches
        self._write(sums | _features(regressions))

    def restore_fitted(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what a step has fitted into tensors of these names, on every rank. Collective."""
        self._restore(tensors, everywhere=True)
        self._fitted |= tensors

    def keep_result(
        self, step: str, result: Any, fitted: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what came of a step that is done, as JSON, and the tensors that it fitted, which
        are the same on all ranks. Collective."""
        self.stage, self.batches = "", 0
        self.results[step] = result
        self._fitted |= fitted or {}
        self._write()

    def keep_loss(self, layers: tuple[int, ...], loss: float) -> None:
        """Write what was measured with `layers` dropped. Collective."""
        self.losses[layers] = loss
        self._write()

    def remove(self) -> None:
        """Remove the file: what was fitted is written. Collective."""
        on_first_rank(self._topology, lambda: self._path.unlink(missing_ok=True))

    def _describe(self) -> str:
        """Return what is done in a line of the log."""
        steps = list(self.results)
        steps += [f"{self.stage} of {self.batches} batches a rank"] if self.stage else []
        steps += [f"{len(self.losses)} orders tried"] if self.losses else []
        return ", ".join(steps)

    # -- the file

    def _restore(self, into: Mapping[str, Tensor], *, everywhere: bool) -> None:
        def read() -> None:
            try:
                with safe_open(self._path, framework="pt") as file:
                    for name, tensor in into.items():
                        tensor.copy_(file.get_tensor(name))
            except (SafetensorError, RuntimeError) as error:
                raise CheckpointError(f"{self._path} is damaged: {error}; remove it") from None

        if not self._topology.is_first:
            for tensor in into.values():
                tensor.zero_()
        on_first_rank(self._topology, read)
        if everywhere:
            for tensor in into.values():
                sum_over_ranks(tensor)

    def _write(self, sums: Mapping[str, Tensor] | None = None) -> None:
        # Not held on to: those of a phase that is over are gigabytes.
        on_first_rank(self._topology, lambda: self._write_file({**self._fitted, **(sums or {})}))

    def _write_file(self, tensors: Mapping[str, Tensor]) -> None:
        content = {
            "stage": self.stage,
            "batches": self.batches,
            "losses": [[list(layers), loss] for layers, loss in self.losses.items()],
            "results": self.results,
        }
        metadata = {"fingerprint": self._fingerprint, "content": json.dumps(content)}
        draft = self._path.with_name(f".{self._path.name}.tmp")
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_tensors(draft, tensors or {_NOTHING: torch.zeros(1)}, metadata)
            except SafetensorError as error:  # a full disk
                raise CheckpointError(f"cannot write {self._path}: {error}") from None
            os.replace(draft, self._path)

    def _read_metadata(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            with safe_open(self._path, framework="pt") as file:
                metadata = file.metadata() or {}
            fingerprint, content = metadata["fingerprint"], json.loads(metadata["content"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error!r}; remove it") from None
        if fingerprint != self._fingerprint:
            raise CheckpointError(
                f"{self._path} is of a fit with other flags, ranks, model or text; remove it, or "
                "name another --output"
            )
        return dict(content)


def _sums(regressions: Mapping[int, Regression]) -> dict[str, Tensor]:
    return {
        f"{layer}.{name}": total
        for layer, regression in regressions.items()
        for name, total in regression.sums.items()
    }


def _features(regressions: Mapping[int, Regression]) -> dict[str, Tensor]:
    by_name = {f"{layer}.features": each.features for layer, each in regressions.items()}
    return {name: features for name, features in by_name.items() if features is not None}
