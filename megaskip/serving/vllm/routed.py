"""Routed models in vLLM: decided per request from its prompt, kept while it is in the batch.

What a request skips is not computed: its tokens are taken out before the sublayer and its rows out
of the attention. Its keys and values have room all the same, which stays empty.
Shapes: N tokens of all requests of a batch, D hidden.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from megaskip.arch.sites import Sites
from megaskip.config.routing import RoutingConfig
from megaskip.errors import UnsupportedModelError
from megaskip.inference.executor import InferenceExecutor
from megaskip.routing.pooling import Pooling
from megaskip.routing.router import PREFIX
from megaskip.routing.routers import Routers
from megaskip.serving.vllm.batch import Batch, only_rows, remembering_backend
from megaskip.serving.vllm.layout import (
    hidden_states_of,
    layers_here,
    names_of_attention,
    put,
    read_argument,
    sites_of,
)
from megaskip.serving.vllm.requests import requests_of, slot_follower

REBUILT = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Attention backends whose metadata of a batch stays as it is when that of another is made:
FlashInfer's, for one, share a plan (vLLM 0.32; the first was run, the others were read)."""


class RoutedModel:
    """What a routed model adds to vLLM's class of its base."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        settings = RoutingConfig.from_dict(config.routing)
        executor = InferenceExecutor(unit=settings.unit)
        routers = Routers(settings, config.routing["layers"], config.hidden_size, executor=executor)
        self.add_module(PREFIX, routers)  # type: ignore[attr-defined]
        route_layers(self, RequestRouting(routers, vllm_config), config, vllm_config)

    @staticmethod
    def get_model_state_cls() -> Any:
        """Return the class by which vLLM's second runner tells about its requests."""
        return slot_follower()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the base's tensors as its class does, and the routers; returns the names of both.

        Raises ValueError where a router is missing: it would skip nothing.
        """
        stored: dict[str, Tensor] = {}
        loaded: set[str] = super().load_weights(_without_routers(weights, stored))  # type: ignore[misc]
        routers: nn.Module = self.get_submodule(PREFIX)  # type: ignore[attr-defined]
        expected = {f"{PREFIX}.{name}": p for name, p in routers.named_parameters()}
        missing = sorted(expected.keys() - stored.keys())
        if missing:
            raise ValueError(
                f"{len(missing)} tensors of routers are missing ({missing[0]}, ...), so nothing "
                "would be skipped; copy or download the folder again, with "
                "skip_routers.safetensors"
            )
        for name, tensor in stored.items():
            put(expected[name], tensor, name)
        return loaded | expected.keys()


class RequestRouting:
    """The routers of a model, and what they decided about the requests of a step."""

    def __init__(self, routers: Routers, vllm_config: Any) -> None:
        self.routers = routers
        self._requests = requests_of(vllm_config)
        self.attention = ""
        """The name of an attention layer, by whose metadata a step's batch is known."""

    def batch(self) -> Batch | None:
        """Return the batch of this step; None where vLLM tries the model out, without requests."""
        metadata = get_forward_context().attn_metadata
        if not metadata:
            return None
        of_layer = metadata[self.attention]
        batch: Batch | None = of_layer.__dict__.get("megaskip_batch")
        if batch is None:
            _, common = of_layer.megaskip_source
            batch = of_layer.megaskip_batch = Batch(common, self._requests)
        return batch if batch.requests else None

    def decide(self, batch: Batch, layer: int, hidden_states: Tensor) -> None:
        """Decide about the requests whose prompts are in this step, from what the layer's attention
        reads [N, D]."""
        routers = self.routers
        together = routers.config.router_input == "first"
        if together and layer != routers.layers[0]:
            return
        decided = routers.layers if together else (layer,)
        asking = list(batch.prompts(layer))
        if not asking:
            return
        # Scored one by one, as a request alone is; the host waits once for all of them.
        features = [_pooled(hidden_states[prompt]) for _, prompt in asking]
        keep = [
            routers.thresholds.keep(routers.router(number)(read), number).flatten()
            for read in features
            for number in decided
        ]
        runs = iter((torch.cat(keep) > 0).tolist())
        for request, _ in asking:
            request.runs |= {number: next(runs) for number in decided}


class RoutedSublayer:
    """What routed sublayers carry."""

    _skip_layer: int
    _skip_routing: RequestRouting
    _skip_reads: tuple[str, int]
    _skip_names: tuple[str, ...]
    """Attention layers inside of it."""
    _skip_decides: bool
    _skip_skips: bool
    _skip_notes: bool
    """Whether what it reads is what the layer's compensation reads."""
    _skip_compensates: bool
    """Whether the compensation is added behind it."""
    _skip_noted: dict[str, Tensor]
    """Of the layer: what its compensation reads, until it is added."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the sublayer's output [N, D]: zeros, or the compensation, where it is skipped."""
        run: Any = super().forward  # type: ignore[misc]
        batch = self._skip_routing.batch()
        if batch is None:
            return run(*args, **kwargs)
        read = read_argument(self._skip_reads, args, kwargs)
        layer = self._skip_layer
        if self._skip_decides:
            self._skip_routing.decide(batch, layer, read)
        if self._skip_notes:
            self._skip_noted["read"] = read
        rows = batch.running(layer)
        if not self._skip_skips or len(rows) == len(batch.requests):
            output = run(*args, **kwargs)
        elif not rows:
            output = torch.zeros_like(read)
        else:
            index = batch.token_index(rows, read.device)
            args, kwargs = _select((args, kwargs), index, len(read))
            with only_rows(batch, rows, self._skip_names):
                ran = run(*args, **kwargs)
            output = torch.zeros_like(read).index_copy_(0, index, ran)
        return self._skip_compensated(output, batch, rows) if self._skip_compensates else output

    def _skip_compensated(self, output: Tensor, batch: Batch, rows: tuple[int, ...]) -> Tensor:
        """Return the output with the compensation added for requests that skip."""
        compensation = self._skip_routing.routers.router(self._skip_layer).compensation
        read = self._skip_noted.pop("read")
        skipped = batch.others(rows)
        if compensation is None or not skipped:
            return output
        index = batch.token_index(skipped, read.device)
        return output.index_add(0, index, compensation(read.index_select(0, index)))


def route_layers(model: Any, routing: RequestRouting, config: Any, vllm_config: Any) -> None:
    """Let the routed layers of a model that has just been built ask `routing`.

    Raises UnsupportedModelError for layers whose parts megaskip does not know.
    """
    _require_plain(model, routing.routers.config, config)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attn_backend = remembering_backend(module.attn_backend)
    compilation = vllm_config.compilation_config
    for index, layer in layers_here(model):
        sites = sites_of(layer, config.model_type)
        attention = getattr(layer, sites.attention)
        routing.attention = routing.attention or names_of_attention(attention, compilation)[0]
        if index in routing.routers.layers:
            names = tuple(names_of_attention(attention, compilation))
            _route_layer(layer, sites, index, routing, names)


def _route_layer(
    layer: nn.Module, sites: Sites, index: int, routing: RequestRouting, names: tuple[str, ...]
) -> None:
    target = routing.routers.config.target
    of_mlp = target == "mlp"
    # The compensation of a whole layer is added to what its attention adds.
    has_map = routing.routers.router(index).compensation is not None
    written = (sites.mlp_update if of_mlp else sites.attention_update) if has_map else ""
    noted: dict[str, Tensor] = {}
    for name in dict.fromkeys((sites.attention, sites.mlp, written or sites.mlp)):
        module: Any = getattr(layer, name)
        is_attention, is_mlp = name == sites.attention, name == sites.mlp
        values = {
            "layer": index,
            "routing": routing,
            "reads": hidden_states_of(module.forward),
            "names": names if is_attention else (),
            "decides": is_attention,
            "skips": (is_attention and not of_mlp) or (is_mlp and target != "attn"),
            "notes": has_map and (is_mlp if of_mlp else is_attention),
            "compensates": name == written,
            "noted": noted,
        }
        base: Any = type(module)
        module.__class__ = _routed_class(base)
        module.__dict__.update({f"_skip_{key}": value for key, value in values.items()})


@functools.cache
def _routed_class(base: Any) -> Any:
    return type(f"Routed{base.__name__}", (RoutedSublayer, base), {"__module__": base.__module__})


def _require_plain(model: Any, settings: RoutingConfig, config: Any) -> None:
    """Raise UnsupportedModelError for what was not run."""
    kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "attn_backend")}
    if kinds != {Attention.__name__}:
        raise UnsupportedModelError(
            f"{config.model_type}: its attention is vLLM's {', '.join(sorted(kinds))}; routed "
            f"models run with {Attention.__name__} alone"
        )
    backends = {m.attn_backend.get_name() for m in model.modules() if isinstance(m, Attention)}
    if other := sorted(backends.difference(REBUILT)):
        raise UnsupportedModelError(
            f"attention backend {', '.join(other)}: what it makes of a batch "
            f"may not outlive that of another; routed models take one of {', '.join(REBUILT)} "
            "(--attention-backend)"
        )
    scaled = getattr(config, "residual_multiplier", 1.0) != 1.0
    if scaled and settings.target == "block" and settings.compensation != "none":
        raise UnsupportedModelError(
            f"{config.model_type}: it multiplies updates of the residual, so the compensation of a "
            "whole layer cannot stand at its attention; use attn or mlp in --granularity"
        )


def _pooled(hidden_states: Tensor) -> Tensor:
    """Return what a router reads of a prompt [T, D], as transformers' side does: [1, 1, D]."""
    row = hidden_states[None]
    everything = torch.ones(row.shape[:2], dtype=torch.bool, device=row.device)
    return Pooling.of("sequence", everything).features(row)


def _select(value: Any, index: Tensor, tokens: int) -> Any:
    """Return arguments of a sublayer for some tokens: tensors [N, ...] or [..., N] are selected."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == tokens:
            return value.index_select(0, index)
        return value.index_select(-1, index) if value.shape[-1:] == (tokens,) else value
    if isinstance(value, (tuple, list)):
        return type(value)(_select(item, index, tokens) for item in value)
    if isinstance(value, dict):
        return {key: _select(item, index, tokens) for key, item in value.items()}
    return value


def _without_routers(
    weights: Iterable[tuple[str, Tensor]], stored: dict[str, Tensor]
) -> Iterable[tuple[str, Tensor]]:
    """Yield the base's weights; note those of routers in `stored`."""
    for name, tensor in weights:
        if name.startswith(f"{PREFIX}."):
            stored[name] = tensor
        else:
            yield name, tensor
