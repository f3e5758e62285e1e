"""Activation checkpointing of the layers that have a backward pass, and of no other."""

from typing import Any

from torch import nn

from megaskip.arch.decoder import find_decoder
from megaskip.errors import UnsupportedModelError


def checkpoint_activations(model: Any, lowest: int) -> None:
    """Keep only the inputs of layers `lowest` and above; they are computed again in the backward
    pass.

    Non-reentrant, so that penalties taken from the first forward pass keep their gradient. The
    layers below have no backward pass and nothing to keep.
    """
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UnsupportedModelError(f"{model.config.model_type}: {error}") from None
    # transformers makes the embedding's output require grad, which would drag the backward pass
    # through the frozen lower layers; non-reentrant checkpoints do not need that.
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
    for index, layer in enumerate(find_decoder(model).layers):
        set_layer_checkpointing(layer, index >= lowest)


def set_layer_checkpointing(layer: nn.Module, active: bool) -> None:
    """Let one layer be checkpointed or not; the flag is read together with the layer's own training
    flag.

    Only the layer's flag is set, not its children's: dropout stays off in a frozen backbone.
    """
    layer.gradient_checkpointing = active  # type: ignore[assignment]
    layer.training = active or layer.training
