"""How each compared method is trained: flags of `megaskip train`, and a run for each seed."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megaskip.checkpoint.routers import CONFIG
from megaskip.config.commands.compare import CompareOptions
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.study.comparison import Comparison

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
}
_FOR_ONE_SKIP = {"published", "separate", "layerwise"}
_TRAINED_AS = {"allocated": "ours"}
_ROWS_A_STEP = 16
_RANK_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"}


def trained_runs(
    comparison: Comparison, method: str, skip: float, options: CompareOptions
) -> list[Path]:
    """Return a method's runs for a skip (a share of all attention), one for each seed; those that
    are missing are trained."""
    if method not in RECIPES:
        return []
    runs = []
    for seed in options.seeds:
        name, flags = _run_for(comparison, method, skip, options)
        run = options.output / "runs" / f"{name}-s{seed}"
        if not ((run / "routers" / CONFIG).is_file() and (run / "report.json").is_file()):
            if options.no_training:
                continue
            _train(options, run, [*RECIPES[method], *flags, "--seed", str(seed)])
        runs.append(run)
    return runs


def train_seconds(run: Path) -> float:
    """Return how long a training took, loading and calibration left out."""
    return float(json.loads((run / "report.json").read_text(encoding="utf-8"))["seconds"])


def _run_for(
    comparison: Comparison, method: str, skip: float, options: CompareOptions
) -> tuple[str, list[str]]:
    """Return (name of the run, without its seed; flags for the capacities that it is trained
    for)."""
    if method in _FOR_ONE_SKIP:
        capacity = 1 - comparison.share(skip)
        return f"{method}-{capacity:.4f}", ["--capacity", f"{capacity:.6f}"]
    low = 1 - comparison.share(max(options.shares))
    middle = 1 - comparison.share(statistics.mean(options.shares))
    name = _TRAINED_AS.get(method, method)
    return name, ["--capacity", f"{middle:.6f}", "--capacity_low", f"{low:.6f}"]


def _train(options: CompareOptions, run: Path, flags: Sequence[str]) -> None:
    """Train one set of routers in a process of its own."""
    command = [sys.executable, "-m", "megaskip", "train", "--model", options.model]
    for entry in options.data:
        command += ["--data", entry]
    command += ["--seq_length", str(options.seq_length), "--layers", options.layers]
    command += ["--max_steps", str(options.steps), "--micro_batch_size", str(_ROWS_A_STEP)]
    command += ["--no-progress"]
    # What is measured here is carved off the same text, and must not be trained on.
    held_out = 16 if options.eval_data else options.documents
    command += ["--calibration_rows", str(options.calibration_rows), "--held_out", str(held_out)]
    command += ["--dtype", "float32", "--save_every", "0", "--output_dir", str(run), *flags]
    command += ["--resume", "auto"]  # one that was interrupted while it calibrated
    command += ["--cache_dir", options.cache_dir] if options.cache_dir else []
    logger.info("%s", " ".join(command))
    # A job of its own, not a rank of this one.
    alone = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    if subprocess.run(command, env=alone).returncode:
        raise MegaskipError(f"a training failed, see above; its command: {shlex.join(command)}")
