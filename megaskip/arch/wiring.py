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
from megaskip.routing.pooling import Pooling
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
    state.begin(None if cached else _pooling(routers, args, kwargs), cached)


def _pooling(routers: Routers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pooling:
    real = real_tokens(args, kwargs)
    packs = routers.config.unit == "sequence"
    return routers.pooling(real, segment_ids=_segments(args, kwargs, real) if packs else None)


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


def real_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return bool [B, T] of the tokens of a model's call that are real (the last T columns of a
    mask that covers the cache)."""
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    mask = _argument("attention_mask", 1, args, kwargs)
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


def _segments(args: tuple[Any, ...], kwargs: dict[str, Any], real: Tensor) -> Tensor | None:
    """Return int64 [B, T], the number of each token's sample in a packed row; None where every row
    is one sample.

    By the rule of transformers, which keeps samples apart where positions do not go up by one and
    there is neither a mask nor a cache.
    """
    position_ids = _argument("position_ids", 2, args, kwargs)
    given = (_argument("attention_mask", 1, args, kwargs), kwargs.get("past_key_values"))
    if position_ids is None or position_ids.dim() != 2 or any(x is not None for x in given):
        return None
    begins = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(begins.any()):
        return None
    return nn.functional.pad(begins.long().cumsum(-1), (1, 0)).expand(real.shape)


def _argument(name: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of the decoder that is given by its place or by its name; None without."""
    return args[index] if len(args) > index else kwargs.get(name)
