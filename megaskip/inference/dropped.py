"""What stands where a sublayer was dropped for good: nothing, or a small map of what it read. Its
cache holds nothing.

Shapes: B rows, T tokens, D hidden, r rank of a map.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.cache_utils import StaticLayer

from megaskip.arch.decoder import DecoderParts, find_decoder
from megaskip.arch.sites import find_sites
from megaskip.inference.hf import AdaptedModel
from megaskip.inference.kept import KeptRows, can_store_some, is_offloaded, store_rows_in
from megaskip.routing.decision import SelectedRows
from megaskip.routing.precision import without_autocast, without_cast

DROPPABLE = ("attn", "mlp")
MAP_KINDS = ("bias", "low_rank")
_NO_ROUTERS = "this model has no routers: its config has dropped, not routing"


class DroppedModel(AdaptedModel):
    """What a model without some sublayers adds to its family's class."""

    def _skip_adapt(self, config: Any) -> None:
        """Drop the sublayers that the config's `dropped` names, and put the maps of its
        `compensation` in their place."""
        if getattr(config, "dropped", None) is None:
            raise ValueError("config.json has neither routing nor dropped")
        maps = getattr(config, "compensation", None)
        drop_sublayers(find_decoder(self), config.dropped, maps)  # type: ignore[arg-type]
        # Maps stay float32, as they were trained; the set is this model's own.
        self._keep_in_fp32_modules_strict |= set(_map_names(self))  # type: ignore[arg-type]

    def _skip_require(self, path: Any, missing: Any) -> None:
        """Raise OSError when the stored weights lack maps: fresh ones add nothing."""
        lacking = sorted(set(missing) & set(_map_names(self)))  # type: ignore[arg-type]
        if lacking:
            raise OSError(
                f"{path}: {len(lacking)} tensors of compensations are missing ({lacking[0]}, ...), "
                "so nothing would stand where sublayers were dropped; copy or download the folder "
                "again, with compensation.safetensors"
            )

    def capacity(self) -> float:
        """Raise RuntimeError: what runs is decided for good."""
        raise RuntimeError(_NO_ROUTERS)

    def set_capacity(self, capacity: float) -> None:
        """Raise RuntimeError: what runs is decided for good."""
        raise RuntimeError(_NO_ROUTERS)


class DroppedForCausalLM(DroppedModel, PreTrainedModel):  # type: ignore[misc]
    """A causal language model without some sublayers; from_pretrained makes the class of the
    family."""

    _skip_mapping, _skip_auto_class = MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"


class DroppedDecoder(DroppedModel, PreTrainedModel):  # type: ignore[misc]
    """A decoder without head and some sublayers; from_pretrained makes the class of the family."""

    _skip_mapping, _skip_auto_class = MODEL_MAPPING, "AutoModel"


class MapLinear(nn.Module):
    """A linear layer of a map: `weight` float32 [out, in] and, where asked for, `bias` [out].

    No nn.Linear, for what quantises a model's linear layers would take these small ones along.
    """

    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float32))
        vector = nn.Parameter(torch.zeros(outputs, dtype=torch.float32)) if bias else None
        self.register_parameter("bias", vector)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] of [..., in], in the type of the weight."""
        return nn.functional.linear(inputs.to(self.weight.dtype), self.weight, self.bias)


class Substitute(nn.Module):
    """In the place of a dropped sublayer: an update of zeros, or a map of what it read.

    A map is `bias` [D], the same for every token, or up(down(x)): `down.weight` [r, D],
    `up.weight` [D, r], `up.bias` [D].
    """

    bias: Tensor | None
    down: MapLinear | None
    up: MapLinear | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)
        self.register_module("down", None)
        self.register_module("up", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # model.half() is about the model's weights; maps stay float32, as they were trained.
        return super()._apply(without_cast(fn), recurse)

    def add_map(self, kind: str, hidden_size: int, rank: int) -> None:
        """Give it a map of zeros, one of MAP_KINDS; a rank is for "low_rank" alone."""
        if kind == "bias":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32))
        else:
            self.down = MapLinear(hidden_size, rank, bias=False)
            self.up = MapLinear(rank, hidden_size, bias=True)

    def update(self, hidden_states: Tensor) -> Tensor:
        """Return what is added to the residual [B, T, D], in the type of what is read."""
        if self.down is not None and self.up is not None:
            with without_autocast(hidden_states.device):
                mapped: Tensor = self.up(self.down(hidden_states))
            return mapped.to(hidden_states.dtype)
        if self.bias is not None:
            return self.bias.to(hidden_states.dtype).expand_as(hidden_states)
        return torch.zeros_like(hidden_states)


class NoAttention(Substitute):
    """In the place of a dropped attention."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._skip_layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the update [B, T, D]; the layer's cache only counts the tokens."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            _count_tokens(cache, self._skip_layer, hidden_states)
        return self.update(hidden_states), None


class NoMlp(Substitute):
    """In the place of a dropped MLP."""

    def __init__(self, *, is_tuple: bool) -> None:
        super().__init__()
        self._skip_is_tuple = is_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the update [B, T, D], as a tuple where the family's MLP returns one."""
        output = self.update(hidden_states)
        return (output, None) if self._skip_is_tuple else output


def drop_sublayers(
    parts: DecoderParts,
    dropped: Mapping[str, Sequence[int]],
    compensation: Mapping[str, Any] | None = None,
) -> None:
    """Replace sublayers of a decoder: `dropped` has the layers by what they lose, attn or mlp.

    `compensation` has `kind` and `rank` of the maps and, by attn or mlp, the layers of `dropped`
    that get one. Norms stay: those behind a sublayer make zero of zero. But a map is written behind
    them, so it takes the place of such a norm, too.
    """
    depth, maps = len(parts.layers), dict(compensation or {})
    require_known(dropped, maps, depth)
    for target in DROPPABLE:
        for index in dropped.get(target, ()):
            layer = parts.layers[index]
            sites = find_sites(layer, parts.model_type)
            substitute: Substitute
            if target == "attn":
                name, behind = sites.attention, sites.attention_update
                substitute = NoAttention(index)
            else:
                name, behind = sites.mlp, sites.mlp_update
                substitute = NoMlp(is_tuple=sites.mlp_is_tuple)
            setattr(layer, name, substitute)
            if index in maps.get(target, ()):
                substitute.add_map(maps["kind"], parts.hidden_size, maps.get("rank", 0))
                if behind != name:
                    setattr(layer, behind, nn.Identity())


def _map_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a model that belong to maps."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, Substitute)
        for parameter, _ in module.named_parameters()
    ]


def require_known(
    dropped: Mapping[str, Sequence[int]], maps: Mapping[str, Any], depth: int
) -> None:
    """Raise ValueError where a config names sublayers, layers or maps that there are not."""
    for target, layers in dropped.items():
        wrong = [layer for layer in layers if not 0 <= layer < depth]
        if target not in DROPPABLE or wrong:
            raise ValueError(
                f"config.dropped: {target!r} of layers {wrong or list(layers)}; expected "
                f"{' and '.join(DROPPABLE)} of layers 0 to {depth - 1}"
            )
    if not maps:
        return
    kind, rank = maps.get("kind"), maps.get("rank", 0)
    if kind not in MAP_KINDS or (kind == "low_rank" and (not isinstance(rank, int) or rank < 1)):
        raise ValueError(
            f"config.compensation: kind {kind!r} of rank {rank!r}; expected "
            f"{' or '.join(MAP_KINDS)}, the latter with a rank of at least 1"
        )
    for target in maps.keys() - {"kind", "rank"}:
        wrong = sorted(set(maps[target]) - set(dropped.get(target, ())))
        if wrong:
            raise ValueError(
                f"config.compensation: {target!r} of layers {wrong}, which config.dropped does not "
                "name"
            )


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
    cache_layer = cache.layers[index]
    if not isinstance(cache_layer, KeptRows) and can_store_some(cache, cache_layer):
        cache_layer = store_rows_in(cache, index)
    if not isinstance(cache_layer, KeptRows):
        _count_in_whole(cache_layer, hidden_states)
        return
    if cache_layer._skip_rows is None:
        cache_layer._skip_rows = SelectedRows.of(torch.zeros(batch, dtype=torch.bool))
    cache_layer.advance(tokens, ran=False)


def _count_in_whole(cache_layer: Any, hidden_states: Tensor) -> None:
    """Count in a cache layer that cannot hold a part; a static one gets room for no heads."""
    batch, tokens = hidden_states.shape[:2]
    if not hasattr(cache_layer, "cumulative_length"):
        raise NotImplementedError(
            f"{type(cache_layer).__name__} cannot go without the keys of a dropped attention; "
            "use a DynamicCache"
        )
    if isinstance(cache_layer, StaticLayer) and not cache_layer.is_initialized:
        nothing = hidden_states.new_zeros(batch, 0, 0, 0)
        cache_layer.lazy_initialization(nothing, nothing)
    cache_layer.cumulative_length += tokens
    if hasattr(cache_layer, "cumulative_length_int"):
        cache_layer.cumulative_length_int += tokens
