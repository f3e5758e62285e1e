"""What a text costs in a routed model and in its base: FLOPs, keys and values, skipped units.

A skipped or dropped unit costs its compensation, if it has one. Counted from what was decided, not
timed; padding and what a batch adds are left out, so the numbers do not depend on how texts were
batched.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megaskip.arch import find_decoder
from megaskip.arch.experts import find_experts
from megaskip.arch.sites import find_sites
from megaskip.inference.dropped import NoAttention, NoMlp, Substitute
from megaskip.routing import Routers
from megaskip.routing.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Sums over texts; ratios of sums are what is reported."""

    kept: float = 0.0
    """Routed units (sequences or tokens, in each routed layer) that ran."""
    units: float = 0.0
    """Routed units there were."""
    flops: float = 0.0
    dense_flops: float = 0.0
    kv: float = 0.0
    """Keys and values held, in (layer, token) pairs."""
    dense_kv: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        names = [field.name for field in dataclasses.fields(Cost)]
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def skip_ratio(self) -> float | None:
        """Return the share of routed units that were skipped; None for a model without routers."""
        return 1 - self.kept / self.units if self.units else None

    @property
    def flop_ratio(self) -> float:
        """Return FLOPs over those of the base."""
        return self.flops / max(self.dense_flops, 1.0)

    @property
    def kv_ratio(self) -> float:
        """Return the memory of keys and values over that of the base."""
        return self.kv / max(self.dense_kv, 1.0)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs."""
    return sum(costs, Cost())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    attention: float
    """FLOPs of a token in the attention's projections."""
    mlp: float
    experts: float
    """Of `mlp`, what a token's experts take."""
    has_attention: bool
    has_mlp: bool
    instead: float
    """FLOPs of a token in the maps that stand in the place of dropped sublayers."""
    window: int | None
    """Tokens that a token sees, itself included; None for all before it."""

    def pairs(self, tokens: float, share: float = 1.0) -> float:
        """Return how many (query, key) pairs a `share` of `tokens` causal tokens makes.

        A window is over the text, of which these tokens are taken to be a share everywhere.
        """
        seen = self.window or tokens
        if tokens <= seen:
            return tokens * share * (tokens * share + 1) / 2
        return (seen * (seen + 1) / 2 + (tokens - seen) * seen) * share**2


class CostModel:
    """Prices texts by the shape of a model and by what its routers kept."""

    def __init__(self, model: Any, routers: Routers | None) -> None:
        parts = find_decoder(model)
        config = model.config.get_text_config(decoder=True)
        self._layers = _layers(model)
        self._pair = _flops_of_a_pair(config)
        self._head = 2.0 * config.vocab_size * parts.hidden_size
        layers = () if routers is None else routers.layers
        self._position = {layer: position for position, layer in enumerate(layers)}
        self._target = "" if routers is None else routers.config.target
        self._unit = "" if routers is None else routers.config.unit
        self._compensation = [] if routers is None else _compensations(routers)
        # Skipped tokens are attended to unless the cache drops them, so attention runs in full.
        self._drops = routers is not None and getattr(routers.executor, "drops_tokens", False)

    def price(
        self, tokens: int, predicted: int, kept: Sequence[float], units: Sequence[float]
    ) -> Cost:
        """Return the cost of a text: `tokens` read, `predicted` of them with logits.

        `kept` and `units` are by routed layer, in the order of Routers.layers.
        """
        flops = dense = predicted * self._head
        held = dense_held = 0.0
        for index, layer in enumerate(self._layers):
            at = self._position.get(index)
            share = 1.0 if at is None else kept[at] / max(units[at], 1.0)
            attended = self._attended(share)
            ran = tokens * (share if self._target in ("mlp", "block") else 1.0)
            skipped = (1 - share) * layer.experts if self._target == "expert" else 0.0
            attention = tokens * attended * layer.attention
            attention += layer.pairs(tokens, attended) * self._pair
            flops += attention * layer.has_attention + ran * (layer.mlp - skipped) * layer.has_mlp
            flops += tokens * layer.instead
            if at is not None:
                flops += tokens * (1 - share) * self._compensation[at]
            dense += tokens * (layer.attention + layer.mlp) + layer.pairs(tokens) * self._pair
            held += min(tokens, layer.window or tokens) * attended * layer.has_attention
            dense_held += min(tokens, layer.window or tokens)
        return Cost(
            kept=sum(kept),
            units=sum(units),
            flops=flops,
            dense_flops=dense,
            kv=held,
            dense_kv=dense_held,
        )

    def _attended(self, share: float) -> float:
        """Return the share of a layer's tokens whose attention is computed and held."""
        if self._target in ("mlp", "expert") or (self._unit == "token" and not self._drops):
            return 1.0
        return share


def _compensations(routers: Routers) -> list[float]:
    """Return the FLOPs of a token that skips, by routed layer: those of its compensation."""
    maps = [routers.router(layer).compensation for layer in routers.layers]
    return [0.0 if module is None else 2.0 * _matrix_weights(module) for module in maps]


def _matrix_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _layers(model: Any) -> list[_Layer]:
    parts, config = find_decoder(model), model.config.get_text_config(decoder=True)
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    experts, layers = find_experts(config.to_dict()), []
    for index, layer in enumerate(parts.layers):
        sites = find_sites(layer, parts.model_type)
        attention, mlp = getattr(layer, sites.attention), getattr(layer, sites.mlp)
        substitutes = [module for module in (attention, mlp) if isinstance(module, Substitute)]
        slides = kinds is None or kinds[index] == "sliding_attention"
        layers.append(
            _Layer(
                attention=2.0 * sum(_active(attention, None)),
                mlp=2.0 * sum(_active(mlp, experts)),
                experts=2.0 * _active(mlp, experts)[1],
                has_attention=not isinstance(attention, NoAttention),
                has_mlp=not isinstance(mlp, NoMlp),
                instead=2.0 * sum(map(_matrix_weights, substitutes)),
                window=window if slides else None,
            )
        )
    # What was dropped for good has no weights left to count: the base's layers are alike.
    attention = max((layer.attention for layer in layers if layer.has_attention), default=0.0)
    mlp = max((layer.mlp for layer in layers if layer.has_mlp), default=0.0)
    return [
        dataclasses.replace(
            layer,
            attention=layer.attention if layer.has_attention else attention,
            mlp=layer.mlp if layer.has_mlp else mlp,
        )
        for layer in layers
    ]


def _active(module: nn.Module, experts: Experts | None) -> tuple[float, float]:
    """Return the numbers of matrix weights that a token is multiplied with: those that all tokens
    share, and those of the `experts` that are chosen for it."""
    shared = chosen = 0.0
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # partitioned by ZeRO-3
        if len(shape) > 1 and experts and "experts." in f"{name}." and "shared" not in name:
            chosen += shape.numel() * experts.per_token / experts.count
        elif len(shape) > 1:
            shared += shape.numel()
    return shared, chosen


def _flops_of_a_pair(config: Any) -> float:
    """Return the FLOPs of one query with one key and its value, over all heads."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "qk_nope_head_dim", None):  # latent attention names its widths
        return 2.0 * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return 4.0 * heads * width
