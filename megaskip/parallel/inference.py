"""A model for inference from any folder that megaskip writes: whole on a device, or sharded.

Knows folders and weights, not what the model is used for.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING

from megaskip.arch import attach_routers
from megaskip.checkpoint import load_routers
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.header import require_whole_shards
from megaskip.checkpoint.routers import CONFIG, read_router_config, read_tensors
from megaskip.config import ModelConfig, RouterConfig, RunConfig
from megaskip.config.run import DEMO
from megaskip.errors import ConfigError
from megaskip.inference.flow import InferenceFlow
from megaskip.inference.hf import MODEL_TYPE, MegaskipForCausalLM
from megaskip.parallel.build import shard_backbone
from megaskip.parallel.load import (
    find_model_folder,
    load_hf_config,
    load_whole,
    weight_dtype,
)
from megaskip.routing import PREFIX, RouterSet


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceModel:
    """A frozen model in evaluation mode, with its routers if it has any."""

    model: Any
    """The HF model; under ZeRO-3 its parameters are partitioned."""
    routers: RouterSet | None
    """None for a dense model, or one whose sublayers were dropped for good."""
    folder: Path
    """Where its tokenizer is."""
    description: str


def load_for_inference(
    name: str,
    *,
    dtype: str = "auto",
    base: str | None = None,
    device: torch.device,
    ds_content: dict[str, Any] | None = None,
) -> InferenceModel:
    """Return the model of an exported, a run, a router or a plain HF folder.

    With `ds_content`, the content of a DeepSpeed JSON, its weights are partitioned over the ranks:
    collective. Raises ConfigError for a folder that is none of these.
    """
    folder, backbone = Path(name), ModelConfig(dtype=dtype)
    routers = folder if (folder / CONFIG).is_file() else folder / "routers"
    if (routers / CONFIG).is_file() and not (folder / "config.json").is_file():
        return _with_router_folder(routers, base, backbone, device, ds_content)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/")) and not folder.exists()
    if name != DEMO and not is_hub_id and not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {folder}: found neither config.json (exported) nor {CONFIG} (routers) there"
        )
    backbone = dataclasses.replace(backbone, model=name)
    found = find_model_folder(backbone)
    content = read_json(found / "config.json")
    require_whole_shards(found)
    if str(content.get("model_type")).startswith(MODEL_TYPE):
        return _exported(found, content, backbone, device, ds_content)
    model = _backbone(found, load_hf_config(found, backbone), backbone, device, ds_content)
    return InferenceModel(model=model, routers=None, folder=found, description=f"{name}, dense")


def _with_router_folder(
    routers: Path,
    base: str | None,
    backbone: ModelConfig,
    device: torch.device,
    ds_content: dict[str, Any] | None,
) -> InferenceModel:
    config, _, described = read_router_config(routers)
    named = base or (described.name if described is not None else "")
    if not named:
        raise ConfigError(f"--model {routers} does not name its base model; give --base")
    backbone = dataclasses.replace(backbone, model=named)
    folder = find_model_folder(backbone)
    require_whole_shards(folder)
    model = _backbone(folder, load_hf_config(folder, backbone), backbone, device, ds_content)
    # Beside what DeepSpeed shards, on what it does not.
    attached = load_routers(model, routers, register=ds_content is None)
    return _routed(model, attached.to(device), folder, "keep", f"{routers} on {named}", config)


def _exported(
    folder: Path,
    content: dict[str, Any],
    backbone: ModelConfig,
    device: torch.device,
    ds_content: dict[str, Any] | None,
) -> InferenceModel:
    routing = content.get("routing")
    if ds_content is None:
        kind = None if backbone.dtype == "auto" else getattr(torch, backbone.dtype)
        # The package's own code, the same that the folder carries.
        model = MegaskipForCausalLM.from_pretrained(folder, dtype=kind or "auto").to(device)
        model.eval().requires_grad_(False)
        routers = model.get_submodule(PREFIX) if routing is not None else None
        what = "sublayers dropped" if routing is None else routing["granularity"]
        return InferenceModel(
            model=model, routers=routers, folder=folder, description=f"{folder}, {what}"
        )
    if routing is None:
        raise ConfigError(
            f"--model {folder} has sublayers dropped for good, which --ds_config cannot shard yet; "
            "evaluate it without"
        )
    # The base's tensors have the base's names, so its own class reads them from this folder.
    family = content["base_model_type"]
    foreign = ("routing", "dropped", "base_model_type", "auto_map", "model_type", "architectures")
    own = {name: value for name, value in content.items() if name not in foreign}
    hf_config = CONFIG_MAPPING[family].from_dict(own)
    model = _backbone(folder, hf_config, backbone, device, ds_content)
    settings = dict(routing)
    kv, layers = settings.pop("kv", "keep"), tuple(settings.pop("layers"))
    config = RouterConfig(layers=layers, **settings)
    attached = attach_routers(model, config, register=False)
    stored = read_tensors(folder / f"{PREFIX}.safetensors")
    attached.load_state_dict({n.removeprefix(f"{PREFIX}."): t for n, t in stored.items()})
    return _routed(model, attached.to(device), folder, kv, str(folder), config)


def _routed(
    model: Any, routers: RouterSet, folder: Path, kv: str, description: str, config: RouterConfig
) -> InferenceModel:
    routers.flow = InferenceFlow(unit=config.unit, kv=kv)
    return InferenceModel(
        model=model,
        routers=routers,
        folder=folder,
        description=f"{description}, {config.granularity}",
    )


def _backbone(
    folder: Path,
    hf_config: Any,
    backbone: ModelConfig,
    device: torch.device,
    ds_content: dict[str, Any] | None,
) -> nn.Module:
    dtype = weight_dtype(backbone, hf_config)
    if ds_content is None:
        return load_whole(folder, hf_config, dtype, backbone, device).eval().requires_grad_(False)
    loss, _ = shard_backbone(RunConfig(model=backbone), folder, hf_config, dtype, ds_content)
    return loss.model.eval()
