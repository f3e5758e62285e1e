"""A model in one piece: built from its config without weights, or loaded with all of them."""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from megaskip.errors import ConfigError, MegaskipError
from megaskip.parallel.loading.source import ModelSource, first_line


def load_whole(source: ModelSource, device: torch.device | None) -> nn.Module:
    """Return the model with all of its weights on `device`, or where they were put without one.
    Every rank calls it by itself."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=source.hf_config,
            dtype=source.dtype,
            **source.build_options,
            **read_onto(device),
        )
    except (OSError, ValueError, ImportError) as error:
        raise MegaskipError(
            f"--model {source.folder}: cannot load its weights ({first_line(error)})"
        ) from None
    return model if device is None else model.to(device)


def read_onto(device: torch.device | None) -> dict[str, Any]:
    """Return what makes from_pretrained read weights onto a GPU, not into the CPU's memory first.

    transformers needs accelerate for that; without it they are moved once they are loaded.
    """
    on_gpu = device is not None and device.type != "cpu"
    return {"device_map": {"": device}} if on_gpu and is_accelerate_available() else {}


def skeleton(source: ModelSource) -> nn.Module:
    """Return the model without weights, on the meta device."""
    with torch.device("meta"):
        return build_model(source)


def build_model(source: ModelSource, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a config, its weights not loaded; raises ConfigError when it cannot be
    built."""
    # transformers notes the type in the config that it is given.
    hf_config = copy.deepcopy(source.hf_config)
    try:
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **source.build_options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"--model {source.name}: cannot be built as a decoder ({first_line(error)})"
        ) from None


def build_tiny(source: ModelSource, tiny_config: Any) -> nn.Module:
    """Return a model of another config, in float32, built as that of `source` is."""
    return build_model(dataclasses.replace(source, hf_config=tiny_config), torch.float32)
