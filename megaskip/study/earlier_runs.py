"""What an earlier start of a comparison left behind, runs and the routers that they start from: is
it what the comparison asks for now?"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import CONFIG, read_router_config
from megaskip.config import RunConfig
from megaskip.config.commands.compare import CompareOptions
from megaskip.config.stored import stored_value
from megaskip.errors import ConfigError
from megaskip.study.recipes import Training
from megaskip.study.static_drops import STATIC

_SETTINGS = {
    "data.data": "--data",
    "data.seq_length": "--seq_length",
    "data.held_out": "--documents or --eval_data",
    "model.dtype": "--dtype",
    "optim.max_steps": "--steps",
    "optim.calibration_rows": "--calibration_rows",
    "router.compensation_rank": "--compensation_rank",
    "optim.compensation_lr": "--compensation_lr",
    "adapter.lora_rank": "--lora_rank",
    "adapter.lora_lr": "--lora_lr or --adapter_lr",
}
_OF_NEW_ROUTERS = {
    "router.granularity": "--granularity",
    "router.layers": "--layers",
    "router.capacity": "--skip",
    "router.capacity_low": "--skip",
}
"""Flags of `megaskip compare` by the settings of a training that they decide; the second ones where
it does not start from routers that are there (--init_routers), which have these settings."""
_OF_STARTS = ("granularity", "layers", "data", "seq_length", "calibration_rows")
"""Options on which the routers depend that a run starts from, whatever its method is."""
START = "start.json"
"""In the folder of such routers: the options that they were made with."""
_OF_MAPS = {"router.compensation_rank", "optim.compensation_lr"}
_OF_ADAPTERS = {"adapter.lora_lr"}
"""Settings of the above that say nothing of a run without maps, or without adapters."""


def require_base(training: Training, base: BaseModel) -> None:
    """Raise CheckpointError where a finished run was trained on another model than `base`."""
    if training.is_done:
        described = read_router_config(training.folder / "routers")[2]
        if described is not None:
            described.require(base, f"the run {training.folder}")


def start_settings(method: str, options: CompareOptions, base: BaseModel) -> dict[str, Any]:
    """Return the options, by name, on which the routers depend that a run of `method` starts
    from."""
    names = [*_OF_STARTS, *([] if options.eval_data else ["documents"])]
    if method in STATIC:
        order, learns = STATIC[method]
        names += ["compensation_rank"] if learns == "trained" else []
        names += ["order_rows"] if order == "greedy" else []
    else:
        names += ["compensation_rank", "cost_rows", "cost_groups"]
    settings = {name: getattr(options, name) for name in names} | {"model": base.weights}
    content: dict[str, Any] = json.loads(json.dumps(settings))  # as it will be read back
    return content


def has_start(training: Training, settings: Mapping[str, Any]) -> bool:
    """Return whether the routers that a run starts from are there, made with these settings. Raises
    ConfigError where the run, finished or not, began from others."""
    assert training.start is not None
    file, is_begun = training.start / START, (training.folder / "run.json").is_file()
    if not file.is_file():  # of a start that was stopped, or from before this record
        return is_begun
    made = read_json(file)
    other = [name for name, value in settings.items() if made.get(name) != value]
    if other and is_begun:
        name = other[0]
        raise ConfigError(
            f"{training.folder} began from {training.start}, made with {name} {made.get(name)}, "
            f"--{name} asks for {settings[name]}: name another --output or remove the run; "
            "--no_training takes it as it is"
        )
    return not other and (training.start / CONFIG).is_file()


def require_as_asked(run: Path, asked: RunConfig) -> None:
    """Raise ConfigError where the folder of a run holds one, finished or not, with other settings
    than `asked`."""
    file = run / "run.json"
    if not file.is_file():
        return
    content = read_json(file)
    for path, flag in _decided(asked).items():
        section, name = path.split(".")
        expected = getattr(getattr(asked, section), name)
        expected = list(expected) if isinstance(expected, tuple) else expected
        trained = stored_value(content, f"config.{path}", object, str(file))
        if trained != expected:
            raise ConfigError(
                f"{run} was trained with {name} {trained}, {flag} asks for {expected}: name "
                "another --output or remove the run; --no_training takes it as it is"
            )


def _decided(asked: RunConfig) -> dict[str, str]:
    """Return the flags of `megaskip compare` that decide something of a run, by its settings."""
    starts_anew = asked.model.init_routers is None
    flags = _SETTINGS | (_OF_NEW_ROUTERS if starts_anew else {})
    unused: set[str] = set()
    if starts_anew and asked.router.compensation == "none":
        unused |= _OF_MAPS
    if not asked.adapter.lora_rank:
        unused |= _OF_ADAPTERS
    return {path: flag for path, flag in flags.items() if path not in unused}
