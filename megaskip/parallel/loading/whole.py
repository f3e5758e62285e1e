"""A model in one piece, loaded with all of its weights."""

from typing import Any

import safetensors
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from megaskip.arch.stage import LayerRange
from megaskip.errors import MegaskipError, first_line
from megaskip.parallel.loading.loaded_values import require_loaded
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.weight_check import plan_of


def load_whole(source: ModelSource, device: torch.device | None) -> nn.Module:
    """Return the model with all of its weights on `device`, or where they were put without one.

    Every rank calls it by itself; without a device it may be collective. Raises CheckpointError as
    `check_weights` does, and when the weights in memory are not those of the files.
    """
    if source.four_bit is not None:
        return _load_quantised(source, device or torch.device("cpu"))
    plan = plan_of(source)
    # Where ranks load together, a RuntimeError may be that of a collective: a rank was lost.
    refused = (OSError, ValueError, ImportError, safetensors.SafetensorError)
    alone = () if device is None else (RuntimeError,)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=source.hf_config,
            dtype=source.dtype,
            **source.build_options,
            **read_onto(device),
        )
    except (*refused, *alone) as error:
        raise MegaskipError(
            f"--model {source.folder}: cannot load its weights ({first_line(error)})"
        ) from None
    if device is not None:
        model = model.to(device)
        require_loaded(source.folder, plan, model)
    return model


def _load_quantised(source: ModelSource, device: torch.device) -> nn.Module:
    """Return the model as a single stage, whose weights are packed one by one as they are read, or
    read packed."""
    from megaskip.parallel.loading.stage_weights import load_stage  # which needs load_whole

    depth = source.text_config.num_hidden_layers
    layers = LayerRange(first=0, stop=depth, depth=depth)
    return load_stage(source, layers, lambda model: model, device)


def read_onto(device: torch.device | None) -> dict[str, Any]:
    """Return what makes from_pretrained read weights onto a GPU, not into the CPU's memory first.

    transformers needs accelerate for that; without it they are moved once they are loaded.
    """
    on_gpu = device is not None and device.type != "cpu"
    return {"device_map": {"": device}} if on_gpu and is_accelerate_available() else {}
