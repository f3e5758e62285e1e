"""How each compared method is trained: flags of `megaskip train`, and a run for each seed."""

import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megaskip.arch.adapters import find_adapted_layers
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import CONFIG
from megaskip.config import AdapterConfig
from megaskip.config.commands.compare import BY_COST_TRAINED, DENSE_LORA, CompareOptions
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.parallel.child import run_child
from megaskip.parallel.topology import LAUNCHER_VARIABLES
from megaskip.study.comparison import Comparison
from megaskip.study.static_drops import LEARNT, STATIC, map_parameters
from megaskip.study.training_costs import CONTROL

logger = get_logger(__name__)

_OURS = ("--lr", "2e-3")
RECIPES: dict[str, tuple[str, ...]] = {
    # The published searches: rate up to 2e-4, penalty up to 0.1 (arXiv 2410.13184).
    "published": ("--budget", "layer", "--pool", "all", "--penalty_weight", "0.1", "--lr", "2e-4"),
    "separate": _OURS,
    "layerwise": (*_OURS, "--budget", "layer"),
    "ours": _OURS,
    "allocated": _OURS,
    "distill": (*_OURS, "--distill", "0.5"),
    "noise": (*_OURS, "--noise", "0.5"),
    "sharp": (*_OURS, "--temperature", "0.3"),
    "smooth": (*_OURS, "--temperature", "3"),
    "affine": (*_OURS, "--router", "affine"),
    "mlp": (*_OURS, "--router", "mlp"),
    "compensated": (*_OURS, "--compensation", "low_rank", "--distill", "0.5"),
    "ours_lora": _OURS,
    DENSE_LORA: (*_OURS, "--budget", "dense"),
    # The rate of the adapters follows the schedule of --lr.
    CONTROL: (*_OURS, "--budget", "dense", "--distill", "0.5"),
}
_FOR_ONE_SKIP = {"published", "separate", "layerwise", "compensated", "ours_lora"}
_TRAINED_AS = {"allocated": "ours"}
_ROWS_A_STEP = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run that a comparison needs."""

    folder: Path
    flags: tuple[str, ...]
    start: Path | None = None
    """Folder of the routers it starts from, which is written before."""

    @property
    def is_done(self) -> bool:
        """Return whether the run is finished."""
        return all((self.folder / name).is_file() for name in (f"routers/{CONFIG}", "report.json"))


def training_of(
    method: str, skip: float, seed: int, comparison: Comparison, options: CompareOptions
) -> Training | None:
    """Return the run that a method needs at a skip (a share of all attention) with a seed; None for
    what is not trained."""
    name, flags, start = _run_for(comparison, method, skip, seed, options)
    if not name:
        return None
    return Training(
        folder=options.output / "runs" / f"{name}-s{seed}",
        flags=(*flags, "--seed", str(seed)),
        start=start,
    )


def train_missing(
    needed: Iterable[Training],
    options: CompareOptions,
    *,
    gpu: int | None,
    progress: Callable[[], object],
) -> None:
    """Train what is not there, --parallel of them at a time; raises MegaskipError when one fails.

    `gpu` is the only one that they see, or None for all.
    """
    missing = {training.folder: training for training in needed if not training.is_done}
    pool = ThreadPoolExecutor(options.parallel)
    try:
        for done in [pool.submit(_train, options, training, gpu) for training in missing.values()]:
            done.result()
            progress()
    finally:  # after an error or Ctrl-C: what runs may save, what waits does not begin
        pool.shutdown(cancel_futures=True)


def train_seconds(run: Path) -> float:
    """Return how long a training took, loading and calibration left out."""
    return float(read_json(run / "report.json")["seconds"])


def _run_for(
    comparison: Comparison, method: str, skip: float, seed: int, options: CompareOptions
) -> tuple[str, tuple[str, ...], Path | None]:
    """Return (name of the run, without its seed; its flags; the folder it starts from); no name for
    what is not trained."""
    if method == CONTROL:
        flags = (*RECIPES[method], *_control_adapters(comparison, skip, options))
        return f"{method}-{skip:.4f}", ("--layers", options.layers, *flags), None
    lora: tuple[str, ...] = ()
    if method.endswith("_lora"):
        lora = ("--lora_rank", str(options.lora_rank), "--lora_lr", f"{options.lora_lr:g}")
    maps: tuple[str, ...] = ("--compensation_rank", str(options.compensation_rank))
    maps += ("--compensation_lr", f"{options.compensation_lr:g}")
    name = f"{method}-r{options.lora_rank}" if lora else method
    kind = STATIC.get(method, ("", ""))[1]
    if kind in LEARNT:
        start = options.output / "fitted" / f"{method}-{skip:.4f}"
        learns = lora or ("--distill", "0.5")
        if kind == "trained":
            learns += maps
        return f"{name}-{skip:.4f}", ("--init_routers", str(start), *learns), start
    if method == BY_COST_TRAINED:
        capacity = 1 - comparison.share(skip)
        start = options.output / "fitted" / f"{method}-{skip:.4f}-s{seed}"
        flags = ("--init_routers", str(start), "--freeze_routers", "--distill", "0.5")
        flags += (*maps, "--capacity", f"{capacity:.6f}")
        return f"{method}-{capacity:.4f}", flags, start
    if method not in RECIPES:
        return "", (), None
    layers = ("--granularity", options.granularity, "--layers", options.layers, *lora)
    if method == DENSE_LORA:
        return name, (*layers, *RECIPES[method]), None
    if method in _FOR_ONE_SKIP:
        capacity = 1 - comparison.share(skip)
        asked: tuple[str, ...] = ("--capacity", f"{capacity:.6f}")
        if method == "compensated":
            asked += maps
        return f"{name}-{capacity:.4f}", (*layers, *RECIPES[method], *asked), None
    low = 1 - comparison.share(max(options.shares))
    middle = 1 - comparison.share(statistics.mean(options.shares))
    asked = ("--capacity", f"{middle:.6f}", "--capacity_low", f"{low:.6f}")
    return _TRAINED_AS.get(method, method), (*layers, *RECIPES[method], *asked), None


def _control_adapters(
    comparison: Comparison, skip: float, options: CompareOptions
) -> tuple[str, ...]:
    """Return the flags of LoRA with nearly as many parameters as maps in the place of the share
    `skip` have, on all sublayers of that kind."""
    target = comparison.plain.target
    kind = "all" if target == "block" else target
    adapted = find_adapted_layers(comparison.model, AdapterConfig(lora_rank=1, lora_targets=kind))
    of_a_rank = sum(layer.in_features + layer.out_features for layer in adapted)
    rank = max(round(map_parameters(comparison, skip, options.compensation_rank) / of_a_rank), 1)
    # alpha = rank: what is added is B A, at the scale of the maps.
    sizes = ("--lora_rank", str(rank), "--lora_alpha", str(rank))
    return (*sizes, "--lora_targets", kind, "--lora_lr", f"{options.adapter_lr:g}")


def train_flags(options: CompareOptions, training: Training) -> list[str]:
    """Return the flags of `megaskip train` for a run."""
    flags = ["--model", options.model]
    for entry in options.data:
        flags += ["--data", entry]
    flags += ["--seq_length", str(options.seq_length)]
    flags += ["--max_steps", str(options.steps), "--micro_batch_size", str(_ROWS_A_STEP)]
    flags += ["--no-progress"]
    # What is measured here is carved off the same text, and must not be trained on.
    held_out = 16 if options.eval_data else options.documents
    flags += ["--calibration_rows", str(options.calibration_rows), "--held_out", str(held_out)]
    flags += ["--dtype", options.dtype, "--save_every", "0", "--output_dir", str(training.folder)]
    flags += training.flags
    flags += ["--resume", "auto"]  # one that was interrupted while it calibrated
    return flags + (["--cache_dir", options.cache_dir] if options.cache_dir else [])


def _train(options: CompareOptions, training: Training, gpu: int | None) -> None:
    """Train one set of routers in a process of its own."""
    command = [sys.executable, "-m", "megaskip", "train", *train_flags(options, training)]
    logger.info("%s", " ".join(command))
    # A job of its own, not a rank of this one.
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    if gpu is not None:
        seen = alone.get("CUDA_VISIBLE_DEVICES", "")
        alone["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    if run_child(command, env=alone):
        raise MegaskipError(f"a training failed, see above; its command: {shlex.join(command)}")
    if not training.is_done:  # a signal ended it, and it has saved
        raise MegaskipError(f"{training.folder} was asked to stop; the same command goes on there")
