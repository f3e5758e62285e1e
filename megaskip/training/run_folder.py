"""Where a run writes: which folder, what it may not overwrite, and run.json (first rank only)."""

import contextlib
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import filelock

from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.checkpoint.resume import checkpoints, read_state
from megaskip.checkpoint.routers import CONFIG
from megaskip.config import RunConfig
from megaskip.config.paths import why_unwritable
from megaskip.errors import CheckpointError, ConfigError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.topology import Topology
from megaskip.reporting.summary import versions

logger = get_logger(__name__)


@contextlib.contextmanager
def open_run_folder(config: RunConfig, topology: Topology) -> Iterator[tuple[Path, Path | None]]:
    """Hold a run folder that no other job writes into; yields (folder, checkpoint to continue
    from). Collective.

    A folder that was chosen here, not by --output_dir, is removed when no run begins in it. Raises
    ConfigError or CheckpointError, as `choose_run_folder` and `hold_run_folder` do.
    """
    folder, checkpoint = on_first_rank(topology, lambda: choose_run_folder(config))
    try:
        with hold_run_folder(topology, folder):
            yield folder, checkpoint
    finally:
        if topology.is_first and config.checkpoint.output_dir is None:
            discard_if_empty(folder)


def choose_run_folder(config: RunConfig) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint to continue from); never a folder whose run would be lost.

    Raises ConfigError or CheckpointError, now rather than after hours of training.
    """
    resume = config.checkpoint.resume
    if resume in (None, "auto"):
        folder, checkpoint = _newest(config)
    else:
        folder, checkpoint = _continue_from(config, Path(str(resume)))
    _require_writable(folder)
    if resume == "auto" and checkpoint is None:
        logger.info("--resume auto: no checkpoint to go on from, a new run begins in %s", folder)
    return folder, checkpoint


@contextlib.contextmanager
def hold_run_folder(topology: Topology, folder: Path) -> Iterator[None]:
    """Lock a run folder, so that no other job writes into it. Collective.

    Raises ConfigError when one does. On a file system without locks it is only logged that nothing
    was locked.
    """
    lock = filelock.FileLock(folder / ".lock")

    def take() -> None:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"--output_dir {folder}: another job writes there; wait for it, or name another "
                "folder"
            ) from None
        except (OSError, NotImplementedError) as error:
            logger.info("%s cannot be locked (%s); start no second job there", folder, error)

    on_first_rank(topology, take)
    try:
        yield
    finally:
        lock.release()


def discard_if_empty(folder: Path) -> None:
    """Remove a run folder that no run has begun in."""
    if all(path.name == ".lock" for path in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


def reopen(folder: Path) -> None:
    """Remove report.json of a finished run that goes on, and warn that its calibrated capacities
    will no longer hold."""
    try:
        (folder / "report.json").unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}/report.json: cannot be removed ({error.strerror})"
        ) from None
    stored = folder / "routers" / CONFIG
    if stored.is_file() and read_json(stored).get("calibrated"):
        logger.warning(
            "%s has calibrated capacities, which are those of the routers so far: run "
            "megaskip calibrate again when this run is done",
            stored.parent,
        )


def is_finished(folder: Path) -> bool:
    """Return whether the run in a folder has written its report."""
    return (folder / "report.json").is_file()


def has_stopped_early(folder: Path, patience: int) -> bool:
    """Return whether the finished run in a folder would end early again with this --early_stop."""
    ending = read_json(folder / "report.json").get("early_stop")
    return bool(ending and ending["stopped"] and 0 < patience <= ending["patience"])


def write_run_file(folder: Path, config: RunConfig, world_size: int) -> None:
    """Write run.json: every setting, resolved, and what it runs on."""
    write_json(
        folder / "run.json",
        {
            "config": dataclasses.asdict(config),
            "world_size": world_size,
            "versions": versions(),
            "git_revision": _git_revision(),
        },
    )


def _newest(config: RunConfig) -> tuple[Path, Path | None]:
    """Return (run folder, its newest checkpoint or None); raises ConfigError when there is one and
    --resume does not ask for it."""
    folder = _named_folder(config)
    existing = checkpoints(folder)
    if existing and config.checkpoint.resume is None:
        raise ConfigError(
            f"--output_dir {folder} holds a run already ({existing[-1].name}); continue it with "
            "--resume auto, or name another folder"
        )
    return folder, existing[-1] if existing else None


def _continue_from(config: RunConfig, checkpoint: Path) -> tuple[Path, Path | None]:
    """Return (run folder, checkpoint) for --resume PATH, which may branch off into a new folder."""
    read_state(checkpoint)
    folder = Path(config.checkpoint.output_dir or checkpoint.parent)
    others = checkpoints(folder)
    newest = others[-1] if others else checkpoint
    if newest.resolve() != checkpoint.resolve():
        raise ConfigError(
            f"--resume {checkpoint}: its run folder {folder} holds {newest.name}, which would be "
            "lost; continue from that one, or branch off into a new --output_dir"
        )
    return folder, checkpoint


def _named_folder(config: RunConfig) -> Path:
    """Return --output_dir, or the next free runs/MODEL-GRANULARITY-NNN (the last one to resume)."""
    if config.checkpoint.output_dir is not None:
        return Path(config.checkpoint.output_dir)
    kind = config.router.granularity if config.model.train == "routers" else "full"
    stem = Path("runs") / f"{Path(config.model.model).name}-{kind}"
    runs = sorted(stem.parent.glob(f"{stem.name}-[0-9][0-9][0-9]"))
    begun = [run for run in runs if checkpoints(run)]
    if config.checkpoint.resume == "auto" and begun:
        return begun[-1]
    number = int(runs[-1].name[-3:]) + 1 if runs else 1
    return stem.with_name(f"{stem.name}-{number:03d}")


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = why_unwritable(folder)
    except OSError as error:
        why = error.strerror or str(error)
    if why is not None:
        raise CheckpointError(
            f"--output_dir {folder}: cannot write there ({why}); name another folder"
        )


def _git_revision() -> str | None:
    """Return the commit of the clone that runs, None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
