"""What a fit has done so far, in one file beside its output: one that was stopped goes on there.

The sums of all ranks are added up before they are written, and go on on the first rank alone, at
fixed numbers of batches. So a fit that was stopped ends with the same bits as one that was not.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
MAPS = "maps"
"""The stage in which the maps are done."""
_NOTHING = "nothing"


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
        """What the tensors are: "" for none, the name of a phase, or MAPS."""
        self.batches: int = stored.get("batches", 0)
        """How many batches of each rank are in the sums."""
        self.explained: dict[int, float] = {int(k): v for k, v in stored.get("explained", [])}
        self.losses: dict[tuple[int, ...], float] = {
            tuple(layers): loss for layers, loss in stored.get("losses", [])
        }
        """What was measured for the order: loss by dropped layers."""
        self._tensors: dict[str, Tensor] = {}
        if stored:
            logger.info(
                "goes on from %s: %s, %d batches a rank, %d orders tried",
                *(path, self.stage or "nothing fitted", self.batches, len(self.losses)),
            )

    @property
    def is_first(self) -> bool:
        """Return whether this rank goes on with the sums."""
        return self._topology.is_first

    def restore(self, into: Mapping[str, Tensor], *, everywhere: bool) -> None:
        """Copy the stored tensors into tensors of their names; on the first rank alone, or on
        every rank. Collective."""

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

    def keep(self, stage: str, batches: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors of the first rank, which are summed over all. Collective."""
        self.stage, self.batches, self._tensors = stage, batches, dict(tensors)
        self._write()

    def keep_maps(self, maps: Mapping[str, Tensor], explained: Mapping[int, float]) -> None:
        """Write the maps, which are done. Collective."""
        self.explained = dict(explained)
        self.keep(MAPS, self.batches, maps)

    def keep_loss(self, layers: tuple[int, ...], loss: float) -> None:
        """Write what was measured with `layers` dropped. Collective."""
        self.losses[layers] = loss
        self._write()

    def remove(self) -> None:
        """Remove the file: what was fitted is written. Collective."""
        on_first_rank(self._topology, lambda: self._path.unlink(missing_ok=True))

    # -- the file

    def _write(self) -> None:
        on_first_rank(self._topology, self._write_file)

    def _write_file(self) -> None:
        content = {
            "stage": self.stage,
            "batches": self.batches,
            "explained": list(self.explained.items()),
            "losses": [[list(layers), loss] for layers, loss in self.losses.items()],
        }
        metadata = {"fingerprint": self._fingerprint, "content": json.dumps(content)}
        draft = self._path.with_name(f".{self._path.name}.tmp")
        with write_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_tensors(draft, self._tensors or {_NOTHING: torch.zeros(1)}, metadata)
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
