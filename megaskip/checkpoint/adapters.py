"""LoRA adapters as files, beside the routers that they were trained with: a folder that peft
loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.adapters import (
    adapter_set,
    attach_adapters,
    lora_settings,
    matches,
    missing_layer,
)
from megaskip.checkpoint.atomic import read_json, write_json, write_tensors
from megaskip.checkpoint.tensors import read_tensors
from megaskip.config import AdapterConfig
from megaskip.config.value_types import is_of, shown
from megaskip.errors import CheckpointError
from megaskip.routing import RouterSet
from megaskip.routing.adapters import AdaptedLayer, AdapterSet

FOLDER = "adapter"
"""Name of the adapter's folder inside of a router folder."""
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts in front of the names of a model's tensors."""
_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<stack>(?:.+\.)?layers)\.(?P<layer>\d+)\.(?P<path>.+)"
    r"\.lora_(?P<kind>[AB])\.weight"
)
_OF_NO_EFFECT = {
    *("task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "target_modules", "lora_dropout", "auto_mapping"),
    *("init_lora_weights", "megatron_core", "qalora_group_size"),
}
"""Settings that are read, or that change nothing once the adapter is trained."""


def write_adapter(folder: Path, adapters: AdapterSet, base: str | None) -> None:
    """Write an adapter folder as peft does; `base` names the model that it belongs to."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in adapters.tensors().items()}
    write_tensors(folder / WEIGHTS, tensors)
    settings = adapters.settings
    settings.save_pretrained(str(folder))
    content = read_json(folder / CONFIG)  # the order of a set depends on the process
    targets = sorted(content["target_modules"])
    named = {"base_model_name_or_path": base, "inference_mode": True, "target_modules": targets}
    write_json(folder / CONFIG, content | named)


def has_adapter(routers: Path) -> bool:
    """Return whether a router folder has an adapter."""
    return (routers / FOLDER / CONFIG).is_file()


def adapter_config(routers: Path) -> AdapterConfig:
    """Return the settings of the adapter in a router folder; those of no adapter without one.

    Raises CheckpointError for an adapter that is not a plain LoRA.
    """
    if not has_adapter(routers):
        return AdapterConfig()
    file = routers / FOLDER / CONFIG
    content = read_json(file)
    expected = {"r": int, "lora_alpha": float, "target_modules": list[str]}
    for name, kind in expected.items():
        if not is_of(content.get(name), kind):
            raise CheckpointError(f"{file}: {name} is {shown(content.get(name))}")
    bias = {"bias"} if content.get("bias") == "none" else set()
    special = [k for k, value in content.items() if value and k not in _OF_NO_EFFECT | bias]
    if content.get("peft_type") != "LORA" or special:
        raise CheckpointError(
            f"{file}: megaskip reads plain LoRA adapters, this one is "
            f"{content.get('peft_type')}{' with ' if special else ''}{', '.join(sorted(special))}; "
            "merge it into its base (peft: merge_and_unload) and take that as the base"
        )
    return AdapterConfig(
        lora_rank=content["r"],
        lora_alpha=float(content["lora_alpha"]),
        lora_targets=",".join(content["target_modules"]),
    )


def load_adapter(
    model: nn.Module, routers: Path, *, device: torch.device | None = None
) -> AdapterSet | None:
    """Let a model, or a stage of one, have the adapter in a router folder, frozen, and return it;
    None where there is none. Raises CheckpointError when it is damaged or does not fit."""
    adapters = read_adapter(routers, device=device)
    if adapters is None:
        return None
    attach_adapters(model, adapters)
    lacking = missing_layer(model, adapters)
    if lacking is not None:
        raise CheckpointError(
            f"{routers / FOLDER / WEIGHTS} has no matrices for {adapters.name_of(lacking)}, which "
            f"{CONFIG} names; copy the whole folder again"
        )
    return adapters


def read_adapter(routers: Path, *, device: torch.device | None = None) -> AdapterSet | None:
    """Return the adapter in a router folder, frozen; None where there is none."""
    if not has_adapter(routers):
        return None
    config, tensors = adapter_config(routers), read_adapter_tensors(routers)
    stack, layers = _layers_of(routers / FOLDER / WEIGHTS, tensors, config.lora_rank)
    names = config.names or ()
    for layer in layers:
        if not any(matches(layer, name) for name in names):
            raise CheckpointError(
                f"{routers / FOLDER}: {WEIGHTS} has matrices for layer {layer.layer}, {layer.path},"
                f" which {CONFIG} does not name; copy the whole folder again"
            )
    settings = lora_settings(config.lora_rank, config.alpha, names)
    adapters = adapter_set(stack, layers, settings, device=device)
    adapters.fill(tensors)
    adapters.learn(False)
    return adapters


def read_adapter_tensors(routers: Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in a router folder by the names of AdapterSet.tensors."""
    stored = read_tensors(routers / FOLDER / WEIGHTS)
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def fill_adapters(routers: Path, of_model: RouterSet) -> None:
    """Take over the adapter in a router folder; raises CheckpointError unless it is what the model
    has adapters for."""
    adapters = of_model.adapters
    if adapters is None:
        if has_adapter(routers):
            raise CheckpointError(
                f"{routers} holds routers that were trained with {FOLDER}/, and the model has no "
                "adapters; without them it is another model"
            )
        return
    file, tensors = routers / FOLDER / WEIGHTS, read_adapter_tensors(routers)
    expected = {name: tuple(t.shape) for name, t in adapters.tensors().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        wrong = sorted(expected.items() ^ found.items())[0][0]
        raise CheckpointError(
            f"{file}: {wrong} is {found.get(wrong, 'not there')}, the run's --lora_rank and "
            f"--lora_targets ask for {expected.get(wrong, 'no such tensor')}"
        )
    adapters.fill(tensors)


def _layers_of(
    file: Path, tensors: Mapping[str, Any], rank: int
) -> tuple[str, tuple[AdaptedLayer, ...]]:
    """Return (what names of decoder layers begin with, the adapted layers) of stored tensors."""
    shapes: dict[tuple[str, int, str], dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(f"{PREFIX}{name}")
        if match is None:
            raise CheckpointError(f"{file}: {name} is no matrix of a LoRA in a decoder layer")
        key = (match["stack"], int(match["layer"]), match["path"])
        shapes.setdefault(key, {})[match["kind"]] = tuple(tensor.shape)
    layers = []
    for (_, layer, path), pair in shapes.items():
        down, up = pair.get("A", ()), pair.get("B", ())
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise CheckpointError(
                f"{file}: layer {layer}, {path} has matrices of shapes {down} and {up}, expected "
                f"({rank}, in) and (out, {rank})"
            )
        layers.append(AdaptedLayer(layer=layer, path=path, in_features=down[1], out_features=up[0]))
    stacks = {stack for stack, _, _ in shapes}
    if len(stacks) != 1:
        raise CheckpointError(
            f"{file} holds adapters of {len(stacks)} stacks of layers, expected 1"
        )
    return stacks.pop(), tuple(sorted(layers, key=lambda layer: (layer.layer, layer.path)))
