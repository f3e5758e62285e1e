"""What a comparison has measured so far: a file for each way to skip, so that one that was stopped
goes on, and ranks that share a folder share out the work.

Knows files, not models.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from megaskip.checkpoint.atomic import write_errors
from megaskip.errors import CheckpointError
from megaskip.study.measured import Measured
from megaskip.study.recipes import Training

_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One measurement: a method at a skip and, where it has seeds, with one of them."""

    method: str
    skip: float
    seed: int | None
    training: Training | None
    """What has to be trained before; None for nothing."""

    @property
    def name(self) -> str:
        """Return a name that no other job of the comparison has."""
        seed = "" if self.seed is None else f"-s{self.seed}"
        return f"{self.method}-{self.skip:.4f}{seed}"

    @property
    def group(self) -> str:
        """Return what jobs share that one rank has to do: those that need the same run or start."""
        if self.training is None:
            return self.name
        return str(self.training.start or self.training.folder)


def share_of(jobs: Sequence[Job], rank: int, world_size: int) -> list[Job]:
    """Return the jobs of one rank of `world_size`: whole groups, in turns."""
    groups = list(dict.fromkeys(job.group for job in jobs))
    mine = set(groups[rank::world_size])
    return [job for job in jobs if job.group in mine]


class Ledger:
    """The measurements in a folder. Ranks write different ones, and read all."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """`settings` are what every measurement depends on; those of others are not taken."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._settings = folder, json.dumps(settings, sort_keys=True)

    @property
    def key(self) -> str:
        """Return a hash of the settings."""
        return hashlib.sha256(self._settings.encode()).hexdigest()[:16]

    def write(self, job: Job, outcome: Measured | str) -> None:
        """Keep what was measured, or why nothing could be; the file appears whole. Raises
        CheckpointError when it cannot be written."""
        arrays = (
            {"left_out": np.array(outcome)} if isinstance(outcome, str) else outcome.to_arrays()
        )
        path = self._path(job)
        draft = path.with_suffix(".tmp")
        with write_errors(path):
            with draft.open("wb") as file:
                np.savez(file, fingerprint=np.array(self._fingerprint(job)), **arrays)
            draft.replace(path)

    def read(self, job: Job) -> Measured | str | None:
        """Return what was measured, or why nothing could be; None where that is not there, or was
        measured with other settings or another run. Raises CheckpointError for a damaged file."""
        path = self._path(job)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove it") from None
        if str(arrays.pop("fingerprint")) != self._fingerprint(job):
            return None
        return str(arrays["left_out"]) if "left_out" in arrays else Measured.from_arrays(arrays)

    def wait(self, jobs: Sequence[Job]) -> None:
        """Wait until all `jobs` are there. A launcher ends a rank whose neighbours failed."""
        while any(self.read(job) is None for job in jobs):
            time.sleep(_POLL_SECONDS)

    def _path(self, job: Job) -> Path:
        return self._folder / f"{job.name}.npz"

    def _fingerprint(self, job: Job) -> str:
        """Return a hash of the settings and of the report of the run, if there is one."""
        report = None if job.training is None else job.training.folder / "report.json"
        trained = report.read_bytes() if report is not None and report.is_file() else b""
        return hashlib.sha256(self._settings.encode() + trained).hexdigest()[:16]
