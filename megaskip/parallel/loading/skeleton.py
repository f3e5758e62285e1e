"""A model built from its config, without the weights of its files."""

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from megaskip.errors import ConfigError, first_line
from megaskip.parallel.loading.quantised import quantise_linears
from megaskip.parallel.loading.source import ModelSource

_CANNOT_BUILD = (
    *(ValueError, ImportError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, AssertionError),
)
"""What a family's constructor raises for a config that does not fit it."""


def skeleton(source: ModelSource) -> nn.Module:
    """Return the model without weights, on the meta device."""
    with torch.device("meta"):
        return build_model(source)


def build_model(source: ModelSource, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a config, its weights not loaded; raises ConfigError when it cannot be
    built."""
    # transformers notes the type in the config that it is given.
    hf_config = copy.deepcopy(source.hf_config)
    if kind := _other_kind(hf_config):
        raise ConfigError(
            f"--model {source.name}: megaskip routes decoder-only language models, and it is {kind}"
        )
    try:
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **source.build_options)
    except _CANNOT_BUILD as error:
        raise ConfigError(
            f"--model {source.name}: cannot be built as a decoder ({first_line(error)})"
        ) from None


def _other_kind(hf_config: Any) -> str:
    """Return what a config describes that transformers has as no causal language model; "" for
    one that it has, and for one that it does not know."""
    has_own_code = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if has_own_code or type(hf_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    name = f"model_type {hf_config.model_type}"
    if getattr(hf_config, "is_encoder_decoder", False):
        return f"an encoder with a decoder ({name}); give another model"
    if hf_config.get_text_config() is not hf_config:
        return (
            f"one for text and other media ({name}); give the text model that it was made from, "
            "or save its language model by itself"
        )
    return ""


def build_uninitialised(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """Return the model of a config with numbers that mean nothing, for those who fill or fake
    them; errors as `build_model`."""
    with no_init_weights():
        model = build_model(source, dtype)
    # Construction without initialisation leaves tied embeddings apart.
    model.tie_weights()  # type: ignore[operator]
    return model


def quantised_skeleton(source: ModelSource) -> nn.Module:
    """Return the model of a 4-bit base without weights, on the meta device."""
    assert source.four_bit is not None
    with torch.device("meta"):
        model = build_uninitialised(source, source.dtype)
    quantise_linears(model, source.dtype, source.four_bit)
    return model


def build_tiny(source: ModelSource, tiny_config: Any) -> nn.Module:
    """Return a model of another config, in float32, built as that of `source` is."""
    return build_model(dataclasses.replace(source, hf_config=tiny_config), torch.float32)
