"""What stands where a sublayer was dropped for good: it adds nothing, and its cache holds nothing.

Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.cache_utils import StaticLayer

from megaskip.arch.decoder import DecoderParts, find_decoder
from megaskip.arch.sites import find_sites
from megaskip.inference.hf import AdaptedModel
from megaskip.inference.kept import KeptRows, can_hold_a_part, holding_rows, is_offloaded
from megaskip.routing.decision import SelectedRows

DROPPABLE = ("attn", "mlp")
_NO_ROUTERS = "this model has no routers: its config has dropped, not routing"


class DroppedModel(AdaptedModel):
    """What a model without some sublayers adds to its family's class."""

    def _skip_adapt(self, config: Any) -> None:
        """Drop the sublayers that the config's `dropped` names."""
        if getattr(config, "dropped", None) is None:
            raise ValueError("config.json has neither routing nor dropped")
        drop_sublayers(find_decoder(self), config.dropped)  # type: ignore[arg-type]

    def capacity(self) -> float:
        """Raise RuntimeError: what runs is decided for good."""
        raise RuntimeError(_NO_ROUTERS)

    def set_capacity(self, capacity: float) -> None:
        """Raise RuntimeError: what runs is decided for good."""
        raise RuntimeError(_NO_ROUTERS)


class DroppedForCausalLM(DroppedModel):
    """A causal language model without some sublayers; from_pretrained makes the class of the
    family."""

    _skip_mapping, _skip_auto_class = MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"


class DroppedDecoder(DroppedModel):
    """A decoder without head and some sublayers; from_pretrained makes the class of the family."""

    _skip_mapping, _skip_auto_class = MODEL_MAPPING, "AutoModel"


class NoAttention(nn.Module):
    """In the place of a dropped attention: no parameters, an update of zeros."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._skip_layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros [B, T, D]; the layer's cache only counts the tokens."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            _count_tokens(cache, self._skip_layer, hidden_states)
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """In the place of a dropped MLP: no parameters, an update of zeros."""

    def __init__(self, *, is_tuple: bool) -> None:
        super().__init__()
        self._skip_is_tuple = is_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return zeros [B, T, D], as a tuple where the family's MLP returns one."""
        output = torch.zeros_like(hidden_states)
        return (output, None) if self._skip_is_tuple else output


def drop_sublayers(parts: DecoderParts, dropped: Mapping[str, Sequence[int]]) -> None:
    """Replace sublayers of a decoder: `dropped` has the layers by what they lose, attn or mlp.

    Norms stay; those behind a sublayer make zero of zero.
    """
    depth = len(parts.layers)
    for target, layers in dropped.items():
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if target not in DROPPABLE or wrong:
            raise ValueError(
                f"config.dropped: {target!r} of layers {wrong or list(layers)}; expected "
                f"{' and '.join(DROPPABLE)} of layers 0 to {depth - 1}"
            )
    for index in dropped.get("attn", ()):
        layer = parts.layers[index]
        setattr(layer, find_sites(layer, parts.model_type).attention, NoAttention(index))
    for index in dropped.get("mlp", ()):
        layer = parts.layers[index]
        sites = find_sites(layer, parts.model_type)
        setattr(layer, sites.mlp, NoMlp(is_tuple=sites.mlp_is_tuple))


def _count_tokens(cache: Any, index: int, hidden_states: Tensor) -> None:
    """Let a cache layer that gets no keys be as long as the text: masks are made from it."""
    batch, tokens = hidden_states.shape[:2]
    if is_offloaded(cache):
        raise NotImplementedError(
            "an offloaded cache fetches a layer when the one below it is updated, which a dropped "
            "attention is not; use a DynamicCache"
        )
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[index]
    if not isinstance(held, KeptRows) and can_hold_a_part(cache, held):
        held = holding_rows(cache, index)
    if not isinstance(held, KeptRows):
        _count_in_whole(held, hidden_states)
        return
    if held._skip_rows is None:
        held.decide(SelectedRows(index=torch.empty(0, dtype=torch.int64), total=batch))
    held.advance(tokens, ran=False)


def _count_in_whole(held: Any, hidden_states: Tensor) -> None:
    """Count in a cache layer that cannot hold a part; a static one gets room for no heads."""
    batch, tokens = hidden_states.shape[:2]
    if not hasattr(held, "cumulative_length"):
        raise NotImplementedError(
            f"{type(held).__name__} cannot go without the keys of a dropped attention; use a "
            "DynamicCache"
        )
    if isinstance(held, StaticLayer) and not held.is_initialized:
        nothing = hidden_states.new_zeros(batch, 0, 0, 0)
        held.lazy_initialization(nothing, nothing)
    held.cumulative_length += tokens
    if hasattr(held, "cumulative_length_int"):
        held.cumulative_length_int += tokens
