"""Attaching routers to a model, or to a stage of one: checks, proof, routers, wires."""

from collections.abc import Sequence

from torch import nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.detach import is_routed
from megaskip.arch.elsewhere import LayerElsewhere
from megaskip.arch.expert_probe import probe_experts
from megaskip.arch.experts import routed_experts
from megaskip.arch.probe import probe_layer
from megaskip.arch.trainable import freeze
from megaskip.arch.wiring import wire
from megaskip.config import RouterConfig, resolve_layers
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.routing import PREFIX, RouterSet


def attach_routers(
    model: nn.Module,
    config: RouterConfig | None = None,
    *,
    register: bool = True,
    verify: bool = True,
) -> RouterSet:
    """Give the decoder layers of `model` fresh routers, freeze everything else and return the
    routers.

    The model computes what it computed before, bit for bit, until the routers learn.
    `register=False` keeps the RouterSet beside the model (for a model that DeepSpeed shards)
    instead of on it as `skip_routers`. `verify` proves on the model itself, with a few tokens, that
    skipping is the identity; a model on which it is not stays as it was: UnsupportedModelError with
    the numbers. Of a stage of a model the layers that it holds are routed; the routers are those of
    the whole model, which are kilobytes.
    """
    config = config or RouterConfig()
    parts = find_decoder(model)
    if any(is_routed(module) for module in model.modules()):
        raise ConfigError("this model has routers already; call detach_routers(model) first")
    layers = resolve_layers(config.layers, len(parts.layers))
    _require_routable(layers, config)
    if config.router_input == "first" and any(isinstance(x, LayerElsewhere) for x in parts.layers):
        raise ConfigError(
            "--router_input first does not go with stages of a pipeline: what the first routed "
            "layer reads is on one of them; take ZeRO-3 (--ds_config ds_configs/zero3.json)"
        )
    experts = routed_experts(config, model.config)
    elsewhere = [layer for layer in layers if isinstance(parts.layers[layer], LayerElsewhere)]
    here = [layer for layer in layers if layer not in elsewhere]
    device = next(iter((parts.layers[here[0]] if here else model).parameters())).device
    if verify and here:
        report = probe_experts(model, here[0], experts) if experts else probe_layer(model, here[0])
        if not report.passed:
            raise UnsupportedModelError(report.explain(parts.model_type))
    routers = RouterSet(config, layers, parts.hidden_size, experts=experts, device=device)
    wire(parts, routers, elsewhere=elsewhere)
    if register:
        model.add_module(PREFIX, routers)
    freeze(model)
    return routers


def _require_routable(layers: Sequence[int], config: RouterConfig) -> None:
    if 0 in layers and config.target not in ("mlp", "expert"):
        raise ConfigError(
            f"layer 0 cannot be routed with --granularity {config.granularity}: the KV cache takes "
            "its length from layer 0; leave it out of --layers"
        )
