"""A router folder: routers.safetensors, router_config.json and, where adapters were trained with
the routers, adapter/: all that export and evaluation need."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megaskip.arch import attach_routers, find_decoder
from megaskip.arch.experts import routed_experts
from megaskip.checkpoint import adapters
from megaskip.checkpoint.atomic import new_folder, read_json, write_json, write_tensors
from megaskip.checkpoint.base import BaseModel, describe_base
from megaskip.checkpoint.tensors import read_tensors
from megaskip.config import RouterConfig
from megaskip.config.value_types import is_of, shown
from megaskip.errors import CheckpointError, ConfigError
from megaskip.routing import PREFIX, RouterSet, make_router
from megaskip.routing.experts import Experts

WEIGHTS = "routers.safetensors"
CONFIG = "router_config.json"
FORMAT = 1


def save_routers(path: str | Path, routers: RouterSet, *, base: BaseModel | None = None) -> Path:
    """Write a router folder, atomically, and return its path. `base` names the model they belong
    to. Older routers there are replaced, files beside them stay; raises CheckpointError where
    something else is."""
    path = Path(path)
    if path.exists() and not (path / CONFIG).is_file() and not _is_empty(path):
        raise CheckpointError(f"{path} holds something else than routers; name a new folder")
    with new_folder(path) as folder:
        if path.is_dir():
            shutil.copytree(path, folder, dirs_exist_ok=True)
        write_router_files(folder, routers, base)
    return path


def why_no_routers(folder: Path) -> str:
    """Return what a folder without routers is, and what to do, for the end of a message."""
    if not folder.exists():
        return "no such folder; give a finished run or a router folder"
    if is_unfinished_run(folder):
        return (
            "a run that has not ended; its routers are written at its end, so continue it: the "
            f"command that began it, with --output_dir {folder} --resume auto"
        )
    if (folder / "config.json").is_file():
        return "a model without routers; give a finished run or a router folder"
    return f"no {CONFIG} there; give a finished run or a router folder"


def is_unfinished_run(folder: Path) -> bool:
    """Return whether `folder` is a run folder that has no report yet."""
    return (folder / "run.json").is_file() and not (folder / "report.json").is_file()


def load_routers(model: nn.Module, path: str | Path, *, register: bool = True) -> RouterSet:
    """Attach the routers of a router folder to `model`, with the adapters that they were trained
    with, if any, and return them.

    Of the base model only the shape is compared here: a model in memory does not tell which files
    its weights came from. Raises CheckpointError when the folder is damaged, incomplete, or belongs
    to a model of another shape.
    """
    path = Path(path)
    config, layers, base = read_router_config(path)
    parts = find_decoder(model)
    if base is not None:
        base.require(describe_base(model.config), f"the router folder {path}")
    experts = routed_experts(config, model.config)
    tensors = read_router_weights(path, layers, config, parts.hidden_size, experts)
    routers = attach_routers(model, dataclasses.replace(config, layers=layers), register=register)
    routers.load_state_dict(tensors)
    device = next(routers.parameters()).device
    routers.take_adapters(adapters.load_adapter(model, path, device=device))
    return routers


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def write_router_files(folder: Path, routers: RouterSet, base: BaseModel | None) -> None:
    """Write the files of a router folder into `folder`."""
    tensors = {f"{PREFIX}.{name}": tensor for name, tensor in routers.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors)
    content: dict[str, Any] = {
        "format": FORMAT,
        "method": "router-tuning",
        **dataclasses.asdict(routers.settled_config()),
        "layers": list(routers.layers),
        "base_model": base.to_json() if base else None,
    }
    shutil.rmtree(folder / adapters.FOLDER, ignore_errors=True)  # of routers that were here before
    if routers.adapters is not None:
        name = None if base is None else base.name
        adapters.write_adapter(folder / adapters.FOLDER, routers.adapters, name)
        content["adapter"] = adapters.FOLDER
    write_json(folder / CONFIG, content)


def read_router_config(path: Path) -> tuple[RouterConfig, tuple[int, ...], BaseModel | None]:
    """Return (configuration, routed layers, base model) of a router folder."""
    file = path / CONFIG
    content = read_json(file)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format {content.get('format')!r}; this version of megaskip reads {FORMAT}"
        )
    try:
        config = RouterConfig.from_dict(content)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if not is_of(content["layers"], tuple[int, ...]):
        raise CheckpointError(
            f"{file}: layers is {shown(content['layers'])}, expected a list of whole numbers"
        )
    if content.get("adapter") is not None and not adapters.has_adapter(path):
        raise CheckpointError(
            f"{path}: its routers were trained with an adapter, and {adapters.FOLDER}/ is not "
            "there; copy the whole folder again"
        )
    base = content.get("base_model")
    if not is_of(base, dict | None):
        raise CheckpointError(f"{file}: base_model is {shown(base)}, expected an object")
    return config, tuple(content["layers"]), BaseModel.from_json(base, file) if base else None


def update_router_config(path: Path, config: RouterConfig) -> None:
    """Rewrite the settings in a router folder's configuration; its weights stay as they are."""
    content = read_json(path / CONFIG)
    settings = {**dataclasses.asdict(config), "layers": content["layers"]}
    write_json(path / CONFIG, content | settings)


def update_router_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Rewrite the weights in a router folder, from a state dict of its routers."""
    draft = path / f".{WEIGHTS}.tmp"
    write_tensors(draft, {f"{PREFIX}.{name}": tensor for name, tensor in weights.items()})
    draft.replace(path / WEIGHTS)


def fill_routers(path: Path, routers: RouterSet) -> None:
    """Take over weights, and adapters if there are any, from a router folder, checked against
    `routers`."""
    routers.load_state_dict(load_router_tensors(path, routers))
    adapters.fill_adapters(path, routers)


def load_router_tensors(path: Path, routers: RouterSet) -> dict[str, Tensor]:
    """Return a router folder's weights as the state dict of `routers`, checked against it."""
    of_model = routers.hidden_size, routers.experts
    return read_router_weights(path, routers.layers, routers.config, *of_model)


def read_router_weights(
    path: Path,
    layers: tuple[int, ...],
    config: RouterConfig,
    hidden_size: int,
    experts: Experts | None = None,
) -> dict[str, Tensor]:
    """Return the routers' state dict from a router folder, checked against what it must hold for a
    model of that size, and with these experts where they are what is skipped."""
    file = path / WEIGHTS
    tensors = read_tensors(file)
    router = make_router(config, hidden_size, experts=experts)
    shapes = {name: tuple(parameter.shape) for name, parameter in router.named_parameters()}
    expected = {
        f"{PREFIX}.{layer}.{config.target}.{name}": shape
        for layer in layers
        for name, shape in shapes.items()
    }
    missing, extra = (
        sorted(expected.keys() - tensors.keys()),
        sorted(tensors.keys() - expected.keys()),
    )
    if missing or extra:
        raise CheckpointError(
            f"{file}: missing {missing or 'nothing'}, unexpected {extra or 'nothing'}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {tuple(tensors[name].shape)}, expected {shape}"
            )
    return {name.removeprefix(f"{PREFIX}."): tensor for name, tensor in tensors.items()}
