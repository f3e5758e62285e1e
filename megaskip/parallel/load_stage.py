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

from megaskip.arch.stage import Slice
from megaskip.config import ModelConfig
from megaskip.errors import MegaskipError
from megaskip.log import get_logger
from megaskip.parallel.converted import converted, is_a_model
from megaskip.parallel.load import build_from_config, load_whole, tensor_files

logger = get_logger(__name__)

PartOfModel = TypeVar("PartOfModel", bound=nn.Module)


def load_stage(
    folder: Path,
    hf_config: Any,
    dtype: torch.dtype,
    config: ModelConfig,
    part: Slice,
    cut: Callable[[nn.Module], PartOfModel],
    device: torch.device,
) -> PartOfModel:
    """Return what `cut` leaves of the model, `part`, with its weights on `device`.

    Every rank calls it by itself and reads its own tensors. Models whose stored names are not those
    of the module (MoE experts that transformers fuses on loading) go through the CPU's memory;
    those whose layers differ by their number besides, such as deepseek_v3, are read whole.
    """
    shards = tensor_files(folder)
    model = _without_weights(hf_config, config, dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    alone = set(names.values()) <= shards.keys() or is_a_model(model, part)
    if not alone:
        logger.info("every rank reads the whole model (its layers differ by their number)")
        whole = load_whole(folder, hf_config, dtype, config, torch.device("cpu"))
        return cut(whole).eval().to(device)
    stage = cut(model).eval()
    wanted = {names[id(parameter)] for parameter in stage.parameters()}
    if wanted <= shards.keys():
        filled = _from_files(stage, names, shards, device)
    else:
        stored = converted(model, part, wanted, shards, dtype)
        filled = {
            id(one): _parameter(stored[names[id(one)]], one, names[id(one)], device)
            for one in stage.parameters()
        }
    for module in stage.modules():
        for name, held in module._parameters.items():
            if held is not None:
                module._parameters[name] = filled[id(held)]
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


def _from_files(
    stage: nn.Module, names: Mapping[int, str], shards: Mapping[str, Path], device: torch.device
) -> dict[int, nn.Parameter]:
    """Return each parameter of the stage with its stored values, by its id; tied ones are one."""
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
    return filled


@torch.no_grad()
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
