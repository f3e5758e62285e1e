"""One stage of a causal LM: the HF model itself, of which this process holds some layers.

No modelling is copied and nothing is renumbered. Where a layer lives elsewhere stands one that
passes its input on and stores keys of width one, so that layer numbers, masks, positions and caches
are those of the whole model. Knows modules, not ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.elsewhere import LayerElsewhere, run_from
from megaskip.arch.task_loss import head_loss
from megaskip.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRange:
    """Which layers of a model a stage holds."""

    first: int
    stop: int
    """One past the last layer."""
    depth: int
    """Layers of the whole model."""

    @property
    def is_first(self) -> bool:
        """Return whether the stage embeds token ids."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Return whether the stage has the final norm and the output embedding."""
        return self.stop == self.depth

    def owned(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of `layers` that lie in this stage."""
        return tuple(layer for layer in layers if self.first <= layer < self.stop)


def layer_ranges(boundaries: Sequence[int], depth: int) -> tuple[LayerRange, ...]:
    """Return the layers of each stage; `boundaries` are the first layers of all but the first."""
    edges = (0, *boundaries, depth)
    return tuple(
        LayerRange(first=first, stop=stop, depth=depth)
        for first, stop in zip(edges, edges[1:], strict=False)
    )


def cut(model: Any, layers: LayerRange) -> None:
    """Leave a causal LM the layers of one stage; in the place of all else stand modules without
    weights.

    The first stage keeps the input embedding, the last one the final norm and the output embedding.
    Raises UnsupportedModelError for a model whose final norm is not found.
    """
    parts = find_decoder(model)
    decoder: Any = parts.decoder
    if not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise UnsupportedModelError(
            f"{parts.model_type}: {type(decoder).__name__} has no final norm called `norm`; "
            "megaskip cannot cut it into stages. Use ZeRO-3 (ds_configs/zero3.json)"
        )
    dtype = next(model.parameters()).dtype
    for index, layer in enumerate(parts.layers):
        if not layers.first <= index < layers.stop:
            parts.layers[index] = LayerElsewhere(layer, index)
    if not layers.is_first:
        decoder.set_input_embeddings(_EmbeddingElsewhere(parts.hidden_size, dtype))
    if not layers.is_last:
        decoder.norm = nn.Identity()
        config = model.config.get_text_config(decoder=True)
        model.set_output_embeddings(HeadElsewhere(config.vocab_size))
    # Input and output embedding are one parameter already, or one of them is elsewhere.
    model._tied_weights_keys = None


class _EmbeddingElsewhere(nn.Module):
    """Stands for the input embedding where hidden states come from another process."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size, self._dtype = hidden_size, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return zeros [B, T, D]."""
        shape = (*input_ids.shape, self._hidden_size)
        return torch.zeros(shape, dtype=self._dtype, device=input_ids.device)


class HeadElsewhere(nn.Module):
    """Stands for the output embedding, which another process holds."""

    fetch: Callable[[Tensor], Tensor] | None = None
    """Fills memory for logits [B, T, V] with those of the last stage; None when nobody here wants
    them."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return logits [B, T, V], or [B, T, 0] when nobody here wants them."""
        shape = hidden_states.shape[:-1]
        if self.fetch is None:
            return hidden_states.new_empty(*shape, 0)
        return self.fetch(hidden_states.new_empty(*shape, self._vocab_size))


class DecoderStage(nn.Module):
    """What one stage runs in training: its layers, and on the last stage the loss behind them."""

    def __init__(self, model: nn.Module, layers: LayerRange, *, chunk_tokens: int) -> None:
        """Take `model` apart, which must not be used afterwards; its parameters stay."""
        super().__init__()
        self.config = model.config
        self.layer_range = layers
        self.dtype: torch.dtype = next(model.parameters()).dtype
        """Of hidden states: the embedding's, for layers may hold packed weights."""
        self.needs_mask = True
        """As in TaskLoss."""
        self.takes_lengths = False
        """As in TaskLoss."""
        self.head = head_loss(model, chunk_tokens) if layers.is_last else None
        cut(model, layers)
        parts = find_decoder(model)
        self.decoder: Any = parts.decoder
        self.hidden_size = parts.hidden_size

    def get_decoder(self) -> nn.Module:
        """Return the base model, as an HF model does."""
        return self.decoder

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        lengths: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return hidden states [B, T, D], after the final norm on the last stage.

        `inputs` are token ids [B, T] on the first stage, hidden states [B, T, D] on the others;
        the others as in TaskLoss.
        """
        mask = attention_mask if self.needs_mask else None
        call: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
        call |= {"use_cache": False}
        call |= lengths or {} if self.takes_lengths else {}
        if self.layer_range.is_first:
            return self.decoder(input_ids=inputs, **call)[0]
        return run_from(self.decoder, self.layer_range.first, inputs, **call)
