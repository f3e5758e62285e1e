"""Models without some sublayers in vLLM: the base's class, built without them.

Shapes: N tokens of all requests of a batch, D hidden.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from megaskip.inference.dropped import Substitute, require_known
from megaskip.serving.vllm.layout import (
    NAMES,
    forget,
    hidden_states_of,
    layers_here,
    put,
    read_argument,
    sites_of,
)

_IN_LAYER = re.compile(r".*\blayers\.(?P<layer>\d+)\.(?P<child>\w+)\.(?P<own>.+)")


class DroppedModel:
    """What a model without some sublayers adds to vLLM's class of its base."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        maps = dict(getattr(config, "compensation", None) or {})
        require_known(config.dropped, maps, config.num_hidden_layers)
        self.__dict__["_skip_substitutes"] = drop_sublayers(
            self, config.model_type, config.dropped, maps, vllm_config.compilation_config
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's tensors as its class does, and the maps; returns the names of both.

        Raises ValueError where a map is missing: nothing would stand in a sublayer's place.
        """
        maps: dict[str, Tensor] = {}
        loaded: set[str] = super().load_weights(self._without_maps(weights, maps))  # type: ignore[misc]
        names = {id(p): name for name, p in self.named_parameters()}  # type: ignore[attr-defined]
        expected = {
            (*key, own): parameter
            for key, substitute in self._skip_substitutes.items()
            for own, parameter in substitute.named_parameters()
        }
        for name, tensor in maps.items():
            parameter = expected.pop(_key_of(name), None)  # type: ignore[arg-type]
            if parameter is None:
                raise ValueError(f"{name} is stored, and config.json says its sublayer is dropped")
            put(parameter, tensor, name)
            loaded.add(names[id(parameter)])
        if expected:
            layer, target, own = min(expected)
            raise ValueError(
                f"{len(expected)} tensors of compensations are missing ({own} of the {target} of "
                f"layer {layer}, ...), so nothing would stand where sublayers were dropped; copy "
                "or download the folder again, with compensation.safetensors"
            )
        return loaded

    _skip_substitutes: dict[tuple[int, str], Substitute]

    def _without_maps(
        self, weights: Iterable[tuple[str, Tensor]], maps: dict[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Yield the weights of sublayers that are there; note the others in `maps`."""
        for name, tensor in weights:
            key = _key_of(name)
            if key is not None and key[:2] in self._skip_substitutes:
                maps[name] = tensor
            else:
                yield name, tensor


class DroppedSublayer(Substitute):
    """In the place of a dropped sublayer."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self._skip_reads = hidden_states_of(replaced.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the update [N, D]."""
        return self.update(read_argument(self._skip_reads, args, kwargs))


def drop_sublayers(
    model: Any,
    family: str,
    dropped: Mapping[str, Sequence[int]],
    compensation: Mapping[str, Any],
    compilation_config: Any,
) -> dict[tuple[int, str], Substitute]:
    """Replace sublayers of a model that has just been built; returns what stands in their place.

    Arguments as of megaskip.inference.dropped.drop_sublayers. They are built first and then left
    out, before weights are read and memory for keys and values is allotted.
    """
    substitutes: dict[tuple[int, str], Substitute] = {}
    for index, layer in layers_here(model):
        for target in (target for target, layers in dropped.items() if index in layers):
            sites = sites_of(layer, family)
            is_attention = target == "attn"
            name = sites.attention if is_attention else sites.mlp
            behind = sites.attention_update if is_attention else sites.mlp_update
            replaced = getattr(layer, name)
            forget(replaced, compilation_config)
            substitute = DroppedSublayer(replaced)
            setattr(layer, name, substitute)
            substitutes[index, target] = substitute
            if index in compensation.get(target, ()):
                hidden_size, rank = model.config.hidden_size, compensation.get("rank", 0)
                substitute.add_map(compensation["kind"], hidden_size, rank)
                if behind != name:
                    setattr(layer, behind, nn.Identity())
    return substitutes


def _key_of(name: str) -> tuple[int, str, str] | None:
    """Return (layer, attn or mlp, name in it) of a stored tensor; None outside of sublayers."""
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        return None
    targets = [target for target, children in NAMES.items() if match["child"] in children]
    return (int(match["layer"]), targets[0], match["own"]) if targets else None
