"""The wires between a model and its routers: gates in the layers, hooks on the decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decision_cache import cached_decisions, put_decisions
from megaskip.arch.decoder import DecoderParts
from megaskip.arch.experts import experts_of
from megaskip.arch.sites import find_sites
from megaskip.arch.sublayer import route_experts, route_layer
from megaskip.routing.routers import Routers


def wire(parts: DecoderParts, routers: Routers, *, elsewhere: Sequence[int] = ()) -> None:
    """Let the routed layers ask the gates of `routers`, and plain calls describe themselves.

    Layers `elsewhere` are those of other processes. A model of which a layer is refused stays as it
    was.
    """
    here = {
        index: layer
        for index, layer in enumerate(parts.layers)
        if index in routers.gates and index not in elsewhere
    }
    sites = {index: find_sites(layer, parts.model_type) for index, layer in here.items()}
    if routers.experts is not None:
        modules = {
            index: experts_of(
                layer, sites[index], routers.experts, f"{parts.model_type}: layer {index}"
            )
            for index, layer in here.items()
        }
        for index, module in modules.items():
            route_experts(module, routers.gates[index])
    else:
        for index, layer in here.items():
            route_layer(layer, sites[index], routers.gates[index])
    _add_hooks(parts.decoder, routers)


def _add_hooks(decoder: nn.Module, routers: Routers) -> None:
    """Let plain calls of the model describe themselves: what is real comes from the attention
    mask."""
    # The hooks find the routers on the decoder: a deep copy of a model has its own there.
    decoder.__dict__["_skip_routers"] = routers
    decoder.__dict__["_skip_hooks"] = (
        decoder.register_forward_pre_hook(_set_batch, with_kwargs=True),
        decoder.register_forward_hook(_remember, with_kwargs=True, always_call=True),
    )


def _set_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    routers: Routers = module.__dict__["_skip_routers"]
    state = routers.state
    state.lock.acquire()
    if state.take_description():
        return
    is_sequence = routers.config.unit == "sequence"
    cached = cached_decisions(kwargs.get("past_key_values")) if is_sequence else {}
    state.begin(None if cached else routers.pooling(_token_mask(args, kwargs)), cached)


def _remember(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    routers: Routers = module.__dict__["_skip_routers"]
    try:
        if output is not None:  # it is None where the forward pass failed
            _cache_decisions(routers, kwargs.get("past_key_values"), output)
    finally:
        routers.state.lock.release()


def _cache_decisions(routers: Routers, given: Any, output: Any) -> None:
    """Let the cache that was given, or made by the model, carry what was decided."""
    cache = getattr(output, "past_key_values", None) if given is None else given
    if cache is not None and routers.config.unit == "sequence" and not cached_decisions(cache):
        put_decisions(cache, routers.decisions())


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return bool [B, T] of the tokens of this call (the last T columns of a mask that covers the
    cache)."""
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -tokens:].to(device=inputs.device, dtype=torch.bool)
    everything = torch.ones(batch, tokens, dtype=torch.bool, device=inputs.device)
    if not isinstance(mask, Tensor) or tokens == 1:
        return everything
    # A mask of every pair, as `generate` makes for a static cache: real is what sees itself, in
    # layers with a sliding window, too.
    itself = mask[:, 0, :, :tokens].diagonal(dim1=-2, dim2=-1)
    return (itself if mask.dtype == torch.bool else itself == 0).expand_as(everything)
