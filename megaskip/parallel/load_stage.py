"""Weights of one pipeline stage: each rank reads its own tensors from the safetensors shards."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megaskip.config import ModelConfig
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.parallel.load import build_from_config, load_whole, tensor_files

logger = get_logger(__name__)

PartOfModel = TypeVar("PartOfModel", bound=nn.Module)


def load_stage(
    folder: Path,
    hf_config: Any,
    dtype: torch.dtype,
    config: ModelConfig,
    cut: Callable[[nn.Module], PartOfModel],
    device: torch.device,
) -> PartOfModel:
    """Return what `cut` leaves of the model, with its weights on `device`. Every rank calls it by
    itself.

    Models whose stored names are not those of the module (MoE experts that transformers fuses on
    loading) are read whole by every rank, into the node's memory, and then cut.
    """
    shards = tensor_files(folder)
    model = _without_weights(hf_config, config, dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if not set(names.values()) <= shards.keys():
        logger.info("every rank reads the whole model (stored tensor names differ from its own)")
        model = load_whole(folder, hf_config, dtype, config, torch.device("cpu"))
        return cut(model).eval().to(device)
    stage = cut(model).eval()
    _fill(stage, names, shards, device)
    return stage.to(device)


def _without_weights(hf_config: Any, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """Return the model with parameters on the meta device and buffers, such as RoPE's, computed."""
    with transformers.initialization.no_init_weights(), _parameters_on_meta():
        model = build_from_config(hf_config, config, dtype)
    # Construction without initialisation leaves tied embeddings apart.
    model.tie_weights()  # type: ignore[operator]
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def as_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(as_meta)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _fill(
    stage: nn.Module, names: Mapping[int, str], shards: Mapping[str, Path], device: torch.device
) -> None:
    """Give every parameter of the stage its stored values; tied ones stay one."""
    filled: dict[int, nn.Parameter] = {}
    wanted: dict[Path, list[nn.Parameter]] = {}
    for parameter in stage.parameters():
        wanted.setdefault(shards[names[id(parameter)]], []).append(parameter)
    for file, parameters in sorted(wanted.items()):
        try:
            with safe_open(file, framework="pt") as handle:
                for one in parameters:
                    stored = handle.get_tensor(names[id(one)])
                    filled[id(one)] = _parameter(stored, one, f"{file}: {names[id(one)]}", device)
        except (OSError, SafetensorError) as error:
            raise MegaskipError(f"{file}: cannot read the weights ({error})") from None
    for module in stage.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = filled[id(held)]


def _parameter(
    stored: torch.Tensor, like: nn.Parameter, what: str, device: torch.device
) -> nn.Parameter:
    if stored.shape != like.shape:
        raise MegaskipError(
            f"{what} has shape {tuple(stored.shape)}, config.json asks for {tuple(like.shape)}"
        )
    # A copy of its own: what is mapped from a file would be read again under memory pressure.
    own = torch.empty(like.shape, dtype=like.dtype, device=device).copy_(stored)
    return nn.Parameter(own, requires_grad=False)
