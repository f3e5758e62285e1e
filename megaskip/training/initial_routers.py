"""Routers that a run starts from (--init_routers): what they are set up as, and their weights."""

import dataclasses
from pathlib import Path
from typing import Any

from megaskip.checkpoint.adapters import adapter_config, has_adapter
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import fill_routers, load_router_tensors, read_router_config
from megaskip.config import AdapterConfig, RouterConfig, RunConfig, resolve_layers
from megaskip.config.routing import Threshold
from megaskip.errors import ConfigError
from megaskip.routing import RouterSet

_STEERED = {
    "capacity",
    "capacity_low",
    "penalty_weight",
    "freeze_routers",
    "threshold",
    "calibrated",
}
"""Settings of a training rather than of the routers' weights: the flags have them."""


def with_initial_routers(config: RunConfig) -> RunConfig:
    """Return `config` with the router settings of --init_routers, if it is given.

    Raises ConfigError when a flag says otherwise than the folder, CheckpointError when the folder
    is none.
    """
    if config.model.init_routers is None:
        return config
    folder = Path(config.model.init_routers)
    stored, layers, described = read_router_config(folder)
    stored = dataclasses.replace(stored, layers=layers)
    depth = max(layers) + 2 if described is None else described.num_layers
    problems: list[str] = []
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(RouterConfig):
        name, asked = field.name, getattr(config.router, field.name)
        if name in _STEERED:
            continue
        of_folder = getattr(stored, name)
        # The published budget holds a capacity by what routers learn, the global one by thresholds.
        is_hinge = name == "budget" and of_folder == "layer"
        taken[name] = "global" if is_hinge and config.router.freeze_routers else of_folder
        if asked == field.default:
            continue
        if (resolve_layers(asked, depth) if name == "layers" else asked) != of_folder:
            problems.append(
                f"--{name} {asked} is not what --init_routers {folder} holds: {of_folder}; leave "
                "the flag out"
            )
    adapter = _initial_adapter(config.adapter, folder, problems)
    has_maps = stored.compensation != "none"
    if config.router.freeze_routers and not has_maps and not adapter.lora_rank:
        problems.append(
            f"--freeze_routers leaves nothing to learn: routers in --init_routers {folder} have "
            "no compensation; add --lora_rank, or leave it out"
        )
    if problems:
        raise ConfigError(*problems)
    threshold = _initial_threshold(config.router, stored, folder)
    router = dataclasses.replace(config.router, **taken, threshold=threshold)
    return dataclasses.replace(config, router=router, adapter=adapter)


def _initial_threshold(asked: RouterConfig, stored: RouterConfig, folder: Path) -> Threshold:
    """Return the threshold to begin with: that of the folder, or for frozen routers the one that
    was found there for the asked capacity. Raises ConfigError where others were found alone."""
    if not asked.freeze_routers or not stored.calibrated:
        return stored.threshold
    try:
        return stored.at_capacity(asked.capacity).threshold
    except ConfigError as error:
        raise ConfigError(f"--init_routers {folder}, --freeze_routers: {error}") from None


def _initial_adapter(asked: AdapterConfig, folder: Path, problems: list[str]) -> AdapterConfig:
    """Return the settings of the adapters: those of the folder's, if it has one. What a flag says
    otherwise goes to `problems`."""
    if not has_adapter(folder):
        return asked
    stored = adapter_config(folder)
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        given, default = getattr(asked, name), getattr(AdapterConfig(), name)
        if given not in (default, getattr(stored, name)):
            problems.append(
                f"--{name} {given} is not what the adapter in --init_routers {folder} has: "
                f"{getattr(stored, name)}; leave the flag out"
            )
    return dataclasses.replace(stored, lora_start=asked.lora_start, lora_lr=asked.lora_lr)


def load_initial_routers(config: RunConfig, routers: RouterSet, base: BaseModel) -> None:
    """Fill `routers` with the weights of --init_routers, if it is given.

    Raises CheckpointError when they belong to another base model or are damaged.
    """
    if config.model.init_routers is None:
        return
    folder = Path(config.model.init_routers)
    described = read_router_config(folder)[2]
    if described is not None:
        described.require(base, f"--init_routers {folder}")
    if routers.adapters is not None and not has_adapter(folder):  # these begin afresh
        routers.load_state_dict(load_router_tensors(folder, routers))
    else:
        fill_routers(folder, routers)
