"""The parts of an HF decoder: its base model, its layers, its head. Knows attribute names only."""

from dataclasses import dataclass

from torch import nn

from megaskip.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """A decoder-only model's parts."""

    decoder: nn.Module
    """The base model, which turns token ids into hidden states."""
    layers: nn.ModuleList
    head: nn.Module | None
    """The output embedding, when the model has one."""
    hidden_size: int
    model_type: str


def find_decoder(model: nn.Module) -> DecoderParts:
    """Return the parts of an HF decoder; raises UnsupportedModelError when its layers cannot be
    found."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else model
    layers = getattr(decoder, "layers", None)
    config = getattr(model, "config", None)
    if config is None or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no list of decoder layers at get_decoder().layers; "
            "megaskip routes Hugging Face decoder-only models (see the support matrix in the "
            "README)"
        )
    get_head = getattr(model, "get_output_embeddings", None)
    text_config = config.get_text_config(decoder=True)
    return DecoderParts(
        decoder=decoder,
        layers=layers,
        head=get_head() if get_head else None,
        hidden_size=text_config.hidden_size,
        # An exported model has a type of its own and names its family besides.
        model_type=getattr(config, "base_model_type", config.model_type),
    )
