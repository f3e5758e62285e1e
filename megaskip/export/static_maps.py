"""Compensations of layers that are dropped for good: trained as part of routers, exported as
ordinary linear layers in the place of the sublayers.

Shapes: D hidden, r rank.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.arch.stage_proof import tiny_config
from megaskip.checkpoint.routers import read_router_weights
from megaskip.config import RouterConfig
from megaskip.errors import UnsupportedModelError
from megaskip.inference.dropped import drop_sublayers
from megaskip.parallel.loading.skeleton import build_tiny, skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.routing.compensation import describe_compensation

SHARD = "compensation.safetensors"
_LINEAR = {"down": "down.weight", "up": "up.weight", "bias": "up.bias"}
"""Names in a folder of what a low-rank compensation calls its tensors."""
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticMaps:
    """What stands in the place of dropped sublayers: one map for each layer."""

    kind: str
    """ "bias" or "low_rank"."""
    rank: int
    target: str
    """What was dropped: attn, mlp or block."""
    tensors: Mapping[int, Mapping[str, Tensor]]
    """By layer: "bias" [D] and, of low rank, "down" [r, D] and "up" [D, r], float32."""

    @property
    def site(self) -> str:
        """Return which sublayer's place the map takes: that of a block stands at its attention."""
        return "attn" if self.target == "block" else self.target

    @property
    def parameters(self) -> int:
        """Return the number of parameters of all maps."""
        return sum(t.numel() for tensors in self.tensors.values() for t in tensors.values())

    def to_config(self) -> dict[str, Any]:
        """Return the `compensation` of the exported config.json."""
        rank = {"rank": self.rank} if self.kind == "low_rank" else {}
        return {"kind": self.kind, **rank, self.site: sorted(self.tensors)}

    def describe(self) -> str:
        """Return kind, rank, number and size of the maps in one line."""
        layers, parameters = len(self.tensors), self.parameters
        return describe_compensation(self.kind, self.rank, layers=layers, parameters=parameters)

    def under(self, names: Mapping[int, str], factor: float) -> dict[str, Tensor]:
        """Return the tensors as they are stored: `names` has the sublayer's name of each layer.

        `factor` is what the model multiplies an update with before it adds it, and the maps do not
        expect.
        """
        stored: dict[str, Tensor] = {}
        for layer, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                own = _LINEAR[name] if self.kind == "low_rank" else name
                stored[f"{names[layer]}.{own}"] = tensor if name == "down" else tensor / factor
        return stored


def read_static_maps(
    folder: Path,
    config: RouterConfig,
    routed: tuple[int, ...],
    hidden_size: int,
    layers: Collection[int],
) -> StaticMaps | None:
    """Return the compensations that a router folder has for `layers`; None where it has none."""
    if config.compensation == "none":
        return None
    stored = read_router_weights(folder, routed, config, hidden_size)
    tensors: dict[int, dict[str, Tensor]] = {layer: {} for layer in sorted(layers)}
    for name, tensor in stored.items():
        layer, _, own = name.partition(".")
        _, is_map, own = own.partition(".compensation.")
        if is_map and int(layer) in tensors:
            tensors[int(layer)][own] = tensor
    return StaticMaps(
        kind=config.compensation,
        rank=config.compensation_rank,
        target=config.target,
        tensors=tensors,
    )


def stored_maps(maps: StaticMaps, source: ModelSource, stack: str) -> dict[str, Tensor]:
    """Return the tensors of the exported folder; `stack` is what names of layers begin with there.

    Raises UnsupportedModelError where a map of a whole layer cannot stand at its attention.
    """
    parts = find_decoder(skeleton(source))
    names = {}
    for layer in maps.tensors:
        sites = find_sites(parts.layers[layer], parts.model_type)
        names[layer] = f"{stack}.{layer}.{sites.mlp if maps.site == 'mlp' else sites.attention}"
    # What skips a sublayer is multiplied as its update is; what skips a layer is added as it is.
    factor = update_factor(source) if maps.target == "block" else 1.0
    return maps.under(names, factor)


def norms_behind(maps: StaticMaps, source: ModelSource) -> dict[str, str]:
    """Return the norm behind the sublayer by attn or mlp, where the family has one: a map takes its
    place, too."""
    parts = find_decoder(skeleton(source))
    sites = find_sites(parts.layers[min(maps.tensors)], parts.model_type)
    name = sites.mlp if maps.site == "mlp" else sites.attention
    behind = sites.mlp_update if maps.site == "mlp" else sites.attention_update
    return {maps.site: behind} if behind != name else {}


@torch.no_grad()
def update_factor(source: ModelSource) -> float:
    """Return what a family multiplies an attention's update with when it adds it (granite does).

    Measured on a tiny model of the family, without sublayers, with ones in the place of the
    attention. Raises UnsupportedModelError when the result is no multiple of ones.
    """
    parts = find_decoder(build_tiny(source, tiny_config(source.hf_config)).double().eval())
    everywhere, last = range(len(parts.layers)), parts.layers[-1]
    dropped = {"attn": everywhere, "mlp": everywhere}
    drop_sublayers(parts, dropped, {"kind": "bias", "attn": everywhere[-1:]})
    substitute: Any = last.get_submodule(find_sites(last, parts.model_type).attention)
    substitute.bias.fill_(1.0)
    added: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        added.append((output[0] if isinstance(output, tuple) else output) - before)

    last.register_forward_hook(note, with_kwargs=True)
    parts.decoder(input_ids=torch.arange(1, 9)[None], use_cache=False)
    factor = float(added[0].mean())
    if not factor or not bool((added[0] - factor).abs().max() <= _TOLERANCE * abs(factor)):
        raise UnsupportedModelError(
            f"{source.hf_config.model_type}: what stands in the place of an attention does not "
            "reach the layer's output as it is, so a map of a whole layer cannot be exported; "
            "train with attn or mlp in --granularity"
        )
    return factor
