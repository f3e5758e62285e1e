"""Checkpoints of a run: the first rank writes them, every rank reads them. Knows files and
parameters, not how they are trained."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megaskip.checkpoint import BaseModel
from megaskip.checkpoint.resume import (
    STATE,
    OptimizerStates,
    TrainerState,
    checkpoints,
    prune,
    read_state,
    require_same_run,
    restore,
    save_checkpoint,
)
from megaskip.errors import CheckpointError
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import versions

_BEST = "best_"


class TrainedWeights(Protocol):
    """What a run trains, as files and as text: the routers, or the whole model."""

    def stored_as(self, name: str) -> tuple[str, str]:
        """Return (file in a folder that `write` filled, name of a tensor in it) of a parameter that
        trains."""
        ...

    def write(self, folder: Path) -> None:
        """Write the weights, and what is needed to read them, into a checkpoint folder."""
        ...

    def require_same(self, checkpoint: Path) -> None:
        """Raise CheckpointError when a checkpoint holds weights that are set up in another way."""
        ...

    def steering(self) -> dict[str, float]:
        """Return what the steering of the capacity remembers."""
        ...

    def steer_from(self, state: Mapping[str, float], checkpoint: Path) -> None:
        """Continue the steering from `state`, which is that of `checkpoint`; raises CheckpointError
        when it began elsewhere."""
        ...

    def save_result(self, output_dir: Path) -> dict[str, Path]:
        """Write what a finished run is kept for; return the paths by what they hold."""
        ...

    def describe(self) -> list[tuple[str, str]]:
        """Return the rows of a run's header that say what trains."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpointer:
    """Saves and resumes one run. Every rank has one."""

    output_dir: Path
    topology: Topology
    engine: StepEngine
    weights: TrainedWeights
    base: BaseModel
    keep_last: int
    """How many checkpoints stay; older ones are removed."""
    train: str
    """What trains, as --train says it."""
    seed: int
    global_batch_size: int
    data_fingerprint: str

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.output_dir / f"step_{step:06d}"

    def best_path(self, step: int) -> Path:
        """Return the folder of what --early_stop keeps of the state after `step` steps."""
        return self.output_dir / f"{_BEST}{step:06d}"

    def best_steps(self) -> list[int]:
        """Return the steps whose state --early_stop keeps."""
        paths = checkpoints(self.output_dir, prefix=_BEST)
        return [int(path.name.removeprefix(_BEST)) for path in paths]

    def save(self, step: int, tokens: int) -> Path:
        """Write the checkpoint of a run after `step` steps and `tokens` real tokens, remove old
        ones, and return its folder. Collective."""
        states = self.engine.optimizer_states()

        def write() -> Path:
            path = self.path(step)
            self._write(path, step, tokens, states)
            prune(self.output_dir, self.keep_last)
            return path

        return on_first_rank(self.topology, write)

    def keep_best(self, step: int, tokens: int, best_of: Callable[[int], int | None]) -> None:
        """Keep the state after `step`, which is the best so far. Collective.

        Older ones stay while a checkpoint is there from which the run could go on with them:
        `best_of` is the best step up to that of a checkpoint.
        """
        states = self.engine.optimizer_states()

        def write() -> None:
            self._write(self.best_path(step), step, tokens, states)
            steps = [read_state(path).step for path in checkpoints(self.output_dir)]
            needed = {self.best_path(best) for s in steps if (best := best_of(s)) is not None}
            for path in self.output_dir.glob(f"{_BEST}*"):
                if path not in needed | {self.best_path(step)}:
                    shutil.rmtree(path, ignore_errors=True)

        on_first_rank(self.topology, write)

    def _write(self, path: Path, step: int, tokens: int, states: OptimizerStates) -> None:
        save_checkpoint(path, self.state(step, tokens), self.weights.write, states)

    def resume(self, path: Path) -> TrainerState:
        """Fill parameters, optimizer and steering from a checkpoint, and return where the run
        stands.

        Every rank reads the files. Raises CheckpointError when they are damaged, or are those of
        another run.
        """
        state = read_state(path)
        require_same_run(path, state, self.state(step=0, tokens=0))
        self.weights.require_same(path)
        restore(
            path,
            self.weights.stored_as,
            self.engine.parameters,
            self.engine.optimizer,
            state.optimizer_steps,
        )
        try:
            self.weights.steer_from(state.steering, path)
        except KeyError as error:
            raise CheckpointError(
                f"{path / STATE} is damaged: its steering lacks {error}; resume another checkpoint"
            ) from None
        return state

    def state(self, step: int, tokens: int) -> TrainerState:
        """Return what a checkpoint records beside weights and optimizer."""
        return TrainerState(
            step=step,
            tokens=tokens,
            optimizer_steps=float(step),
            steering=self.weights.steering(),
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            data_fingerprint=self.data_fingerprint,
            train=self.train,
            versions=versions(),
            base_model=self.base.to_json(),
        )
