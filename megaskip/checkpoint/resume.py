"""Checkpoints of a run: what trains, its optimizer, and where the run stands. Independent of ranks
and engines."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.checkpoint.adapters import adapter_config
from megaskip.checkpoint.atomic import new_folder, read_json, write_json, write_tensors
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import read_router_config
from megaskip.checkpoint.tensors import read_tensors
from megaskip.config import AdapterConfig, RouterConfig
from megaskip.config.value_types import wrong_types
from megaskip.errors import CheckpointError
from megaskip.routing import RouterSet

COMPLETE = "COMPLETE"
STATE = "trainer.json"
OPTIMIZER = "optim.safetensors"
FORMAT = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = "step"
"""Steps that AdamW has taken; stored for parameters that began to learn later than the run."""
_MOVED = {"layers", "threshold", "calibrated"}
"""Router settings that a run itself changes or resolves; see `require_same_thresholds`."""
OptimizerStates = Mapping[str, Mapping[str, Tensor]]
"""AdamW's state by parameter: exp_avg, exp_avg_sq and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a run stands after a step; with the seed this determines everything that comes
    after."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Real tokens seen."""
    optimizer_steps: float
    steering: Mapping[str, float]
    """State of the budget (see routing.Budget)."""
    global_batch_size: int
    seed: int
    data_fingerprint: str
    train: str
    versions: Mapping[str, str]
    base_model: Mapping[str, Any]


def save_checkpoint(
    path: Path,
    state: TrainerState,
    write_weights: Callable[[Path], None],
    moments_of: OptimizerStates,
) -> None:
    """Write a checkpoint folder, whole or not at all; `write_weights` adds the files of what
    trains, `moments_of` has AdamW's state of each parameter."""
    with new_folder(path) as folder:
        write_weights(folder)
        stored = {
            f"{kind}/{name}": moments[kind]
            for name, moments in moments_of.items()
            for kind in _MOMENTS
        }
        taken = {name: moments[_STEP] for name, moments in moments_of.items()}
        late = {name: step for name, step in taken.items() if float(step) != state.optimizer_steps}
        write_tensors(folder / OPTIMIZER, stored | {f"{_STEP}/{n}": s for n, s in late.items()})
        write_json(folder / STATE, {"format": FORMAT, **dataclasses.asdict(state)})
        (folder / COMPLETE).write_text("\n", encoding="utf-8")


def checkpoints(output_dir: Path, *, prefix: str = "step_") -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; `prefix` stands before their steps'
    numbers."""
    complete = [path for path in output_dir.glob(f"{prefix}*") if (path / COMPLETE).is_file()]
    numbered = [path for path in complete if path.name.removeprefix(prefix).isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(prefix)))


def prune(output_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints, and drafts that a killed run left
    behind."""
    for path in [*checkpoints(output_dir)[:-keep_last], *output_dir.glob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def read_state(path: Path) -> TrainerState:
    """Return the state in a checkpoint folder; raises CheckpointError when it is incomplete or
    damaged."""
    if not (path / COMPLETE).is_file():
        raise CheckpointError(
            f"--resume {path}: not a complete checkpoint (no file {COMPLETE} in it)"
        )
    content = read_json(path / STATE)
    if content.pop("format", None) != FORMAT:
        raise CheckpointError(
            f"{path / STATE}: not of format {FORMAT}, which this version of megaskip reads"
        )
    names = {field.name for field in dataclasses.fields(TrainerState)}
    if content.keys() != names:
        raise CheckpointError(
            f"{path / STATE} is damaged: its fields are {', '.join(sorted(content))}"
        )
    state = TrainerState(**content)
    for problem in wrong_types(state, f"{path / STATE} is damaged: "):
        raise CheckpointError(problem)
    return state


def require_same_run(path: Path, old: TrainerState, new: TrainerState) -> None:
    """Raise CheckpointError when continuing `old` with the settings of `new` would not be the same
    run."""
    base = BaseModel.from_json(dict(old.base_model), path / STATE)
    base.require(BaseModel.from_json(dict(new.base_model), path / STATE), f"the checkpoint {path}")
    flags = {
        "seed": "--seed",
        "train": "--train",
    }
    for field, flag in flags.items():
        _require_equal(path, flag, getattr(old, field), getattr(new, field))
    if old.data_fingerprint != new.data_fingerprint:
        raise CheckpointError(
            f"--resume {path}: the data are others than those of the run that wrote it (--data, "
            "--eval_data or their files; --held_out, --seq_length, --packing, --streaming, "
            "--max_samples, --chat_template, the tokenizer); its run.json has the settings. Use "
            "the same, or start a new run in another --output_dir"
        )


def require_same_routers(path: Path, routers: RouterSet) -> None:
    """Raise CheckpointError when `routers` are set up in another way than those of a checkpoint."""
    stored, layers, _ = read_router_config(path)
    _require_equal(path, "--layers", layers, routers.layers)
    for field in dataclasses.fields(stored):
        if field.name not in _MOVED:
            values = (getattr(config, field.name) for config in (stored, routers.config))
            _require_equal(path, f"--{field.name}", *values)
    _require_same_adapters(path, routers)


def require_same_thresholds(path: Path, routers: RouterSet) -> None:
    """Raise CheckpointError when `routers`, steered as those of a checkpoint were, have other
    thresholds than they: they began with others."""
    stored, current = read_router_config(path)[0], routers.settled_config()
    pairs = zip(_by_layer(stored, routers), _by_layer(current, routers), strict=True)
    # Other machines may round the last digit of a score in another way.
    if not all(math.isclose(was, now, rel_tol=1e-9) for was, now in pairs):
        raise CheckpointError(
            f"--resume {path}: its thresholds are {stored.describe_threshold()}, with these flags "
            f"they are {current.describe_threshold()}; give the --init_routers or --threshold that "
            "the run began with, or start a new run in another --output_dir"
        )


def _by_layer(config: RouterConfig, routers: RouterSet) -> tuple[float, ...]:
    threshold = config.threshold
    return (threshold,) * len(routers.layers) if isinstance(threshold, float) else threshold


def _require_same_adapters(path: Path, routers: RouterSet) -> None:
    stored, current = adapter_config(path), AdapterConfig()
    if routers.adapters is not None:
        current = routers.adapters.config()
    _require_equal(path, "--lora_rank", stored.lora_rank, current.lora_rank)
    _require_equal(path, "--lora_alpha", stored.alpha, current.alpha)
    _require_equal(path, "--lora_targets", stored.lora_targets, current.lora_targets)


def _require_equal(path: Path, flag: str, stored: object, current: object) -> None:
    if stored != current:
        raise CheckpointError(
            f"--resume {path}: {flag} differs from the run that wrote it ({stored} there, "
            f"{current} now); use the same, or start a new run in another --output_dir"
        )


def restore(
    path: Path,
    stored_as: Callable[[str], tuple[str, str]],
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    steps: float,
) -> None:
    """Fill parameters and AdamW's moments from a checkpoint, in which a parameter is `stored_as`
    (file, name)."""
    moments = read_tensors(path / OPTIMIZER)
    files = {file: read_tensors(path / file) for file in {stored_as(n)[0] for n in parameters}}
    with torch.no_grad():
        for name, parameter in parameters.items():
            file, key = stored_as(name)
            _copy(parameter, files[file], key, path / file)
            state = optimizer.state.get(parameter)
            if state is None:  # another rank updates it
                continue
            own = moments.get(f"{_STEP}/{name}")
            state["step"].fill_(steps if own is None else float(own))
            for kind in _MOMENTS:
                _copy(state[kind], moments, f"{kind}/{name}", path / OPTIMIZER)


def _copy(target: Tensor, tensors: Mapping[str, Tensor], name: str, file: Path) -> None:
    if name not in tensors:
        raise CheckpointError(
            f"{file} lacks {name}; it belongs to other --layers, --granularity or another model"
        )
    if tensors[name].shape != target.shape:
        raise CheckpointError(
            f"{file}: {name} has shape {tuple(tensors[name].shape)}, the model needs "
            f"{tuple(target.shape)}"
        )
    target.copy_(tensors[name])
