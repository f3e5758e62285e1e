"""Attach routers to a model and take them off again. One place, one prefix, nothing left behind."""

from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.anatomy import find_decoder, freeze
from megaskip.arch.probe import probe_layer
from megaskip.arch.sites import find_sites
from megaskip.arch.sublayer import is_routed, route_layer, unroute
from megaskip.config import RouterConfig, resolve_layers
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.inference.held import HeldDecisions, held_by, hold
from megaskip.routing import PREFIX, Pooling, RouterSet


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
    the numbers.
    """
    config = config or RouterConfig()
    anatomy = find_decoder(model)
    if any(is_routed(module) for module in model.modules()):
        raise ConfigError("this model has routers already; call detach_routers(model) first")
    layers = resolve_layers(config.layers, len(anatomy.layers))
    if 0 in layers and config.target != "mlp":
        raise ConfigError(
            f"layer 0 cannot be routed with --granularity {config.granularity}: the KV cache takes "
            f"its length "
            "from layer 0; leave it out of --layers"
        )
    device = next(iter(anatomy.layers[layers[0]].parameters())).device
    if verify:
        report = probe_layer(model, layers[0])
        if not report.passed:
            raise UnsupportedModelError(report.explain(anatomy.model_type))
    routers = RouterSet(config, layers, anatomy.hidden_size, device=device)
    for index, gate in routers.gates.items():
        layer = anatomy.layers[index]
        route_layer(layer, find_sites(layer, anatomy.model_type), gate)
    _add_hooks(anatomy.decoder, routers)
    if register:
        model.add_module(PREFIX, routers)
    freeze(model)
    return routers


def detach_routers(model: nn.Module) -> None:
    """Take the routers off `model`: its classes, hooks and keys are those it had before."""
    anatomy = find_decoder(model)
    for module in anatomy.decoder.modules():
        if is_routed(module):
            unroute(module)
    for handle in anatomy.decoder.__dict__.pop("_skip_hooks", ()):
        handle.remove()
    if hasattr(model, PREFIX):
        delattr(model, PREFIX)


def _add_hooks(decoder: nn.Module, routers: RouterSet) -> None:
    """Let plain calls of the model announce themselves: what is real comes from the attention
    mask."""

    def announce(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        past = kwargs.get("past_key_values")
        if routers.take_announcement():
            return
        held = held_by(past) if config_is_sequence else {}
        routers.begin(_pooling(routers, _token_mask(args, kwargs)), held)

    def remember(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is not None and config_is_sequence and not isinstance(cache, HeldDecisions):
            hold(cache, routers.decisions())

    config_is_sequence = routers.config.unit == "sequence"
    decoder.__dict__["_skip_hooks"] = (
        decoder.register_forward_pre_hook(announce, with_kwargs=True),
        decoder.register_forward_hook(remember, with_kwargs=True),
    )


def _pooling(routers: RouterSet, token_mask: Tensor) -> Pooling:
    if routers.config.unit == "token":
        return Pooling.tokens(token_mask)
    return Pooling.sequences(token_mask, token_mask)


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return bool [B, T] of the tokens of this call (the last T columns of a mask that covers the
    cache)."""
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -tokens:].to(device=inputs.device, dtype=torch.bool)
    return torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
