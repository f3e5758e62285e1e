"""Weights of one pipeline stage: each rank reads its own tensors from the safetensors shards."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from megaskip.arch.stage import LayerRange
from megaskip.errors import MegaskipError, UnsupportedModelError
from megaskip.log import get_logger
from megaskip.parallel.loading.converted import load_converted, makes_same_layers
from megaskip.parallel.loading.loaded_values import require_same_weight
from megaskip.parallel.loading.packed_values import read_packed
from megaskip.parallel.loading.quantised import (
    is_quantised,
    quantise_linears,
    quantised,
    require_quantised,
)
from megaskip.parallel.loading.skeleton import build_uninitialised
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stored_values import read_stored
from megaskip.parallel.loading.weight_check import plan_of
from megaskip.parallel.loading.weight_plan import WeightPlan
from megaskip.parallel.loading.whole import load_whole

logger = get_logger(__name__)

Stage = TypeVar("Stage", bound=nn.Module)


def load_stage(
    source: ModelSource,
    layers: LayerRange,
    take_apart: Callable[[nn.Module], Stage],
    device: torch.device,
) -> Stage:
    """Return what `take_apart` leaves of the model, `layers` and what goes with them, with its
    weights on `device`.

    Every rank calls it by itself and reads its own tensors. Models whose stored tensors
    transformers joins or splits (experts) go through the CPU's memory; those whose layers differ by
    their number besides, such as deepseek_v3, are read whole. Raises CheckpointError as
    `check_weights` does, and when the weights in memory are not those of the files.
    """
    plan = plan_of(source)
    model = _without_weights(source)
    if not _reads_its_own(model, plan, layers):
        return _taken_from_whole(source, take_apart, device)
    if source.four_bit is not None:
        quantise_linears(model, source.dtype, source.four_bit)
    names, exact = _stored_names(model), _kept_exact(model)
    stage = take_apart(model).eval()
    # Buffers count that are stored, such as the bias by which experts are chosen.
    buffers = [buffer for buffer in stage.buffers() if names.get(id(buffer)) in plan.stored]
    wanted = {names[id(empty)]: empty for empty in (*stage.parameters(), *buffers)}
    packed = {name: plan.packed[name] for name in wanted if name in plan.packed}
    plain = wanted.keys() - packed.keys()
    filled: dict[str, Tensor] = dict(read_packed(source.folder, packed, device))
    for name, tensor in _values(source, plan, model, layers, plain):
        filled[name] = _own(tensor, wanted[name], name, source, device, exact(name))
    for name, empty in wanted.items():
        if name not in filled:
            raise MegaskipError(
                f"{source.folder}: no stored tensor becomes {name}; is it complete?"
            )
        if not is_quantised(empty):
            require_same_weight(source.folder, plan, name, filled[name])
    _replace(stage, {id(wanted[name]): weight for name, weight in filled.items()})
    return stage.to(device)


def _reads_its_own(model: nn.Module, plan: WeightPlan, layers: LayerRange) -> bool:
    """Return whether the weights of a stage can be read without those of the other stages."""
    named = plan.stored.keys() | plan.packed.keys()
    is_stored_as_named = {name for name, _ in model.named_parameters()} <= named
    return is_stored_as_named or makes_same_layers(model, layers)


def _taken_from_whole(
    source: ModelSource, take_apart: Callable[[nn.Module], Stage], device: torch.device
) -> Stage:
    """Return a stage of the whole model, which is read into the CPU's memory."""
    if source.four_bit is not None:
        raise UnsupportedModelError(
            f"{source.hf_config.model_type}: a base in 4 bit is read weight by weight, and this "
            "family's layers differ by their number; name the 16-bit model, without --base_dtype "
            "nf4"
        )
    logger.info("every rank reads the whole model (its layers differ by their number)")
    whole = load_whole(source, torch.device("cpu"))
    return take_apart(whole).eval().to(device)


def _values(
    source: ModelSource,
    plan: WeightPlan,
    model: nn.Module,
    layers: LayerRange,
    names: Set[str],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the values of the weights `names`, which are not packed in the files."""
    if names <= plan.stored.keys():
        yield from read_stored(source.folder, {name: plan.stored[name] for name in names})
        return
    for name, tensor in load_converted(model, layers, set(names), plan, source).items():
        if name in names:
            yield name, tensor


def _replace(stage: nn.Module, filled: Mapping[int, Tensor]) -> None:
    """Put tensors in the place of a stage's own, which they are filed under by id."""
    for module in stage.modules():
        for tensors in (module._parameters, module._buffers):
            for name, empty in tensors.items():
                if empty is not None:
                    tensors[name] = filled.get(id(empty), empty)  # type: ignore[assignment]


def _stored_names(model: nn.Module) -> dict[int, str]:
    """Return the name of each parameter and stored buffer, by its id; tied ones have the first."""
    stored = model.state_dict(keep_vars=True)
    return {id(stored[name]): name for name in reversed(stored)}


def _kept_exact(model: nn.Module) -> Callable[[str], bool]:
    """Return what tells the names of tensors that transformers keeps in float32."""
    modules = {
        module
        for kind in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for module in getattr(model, kind, None) or ()
    }
    return lambda name: any(module in name for module in modules)


def _without_weights(source: ModelSource) -> nn.Module:
    """Return the model with parameters on the meta device and buffers, such as RoPE's, computed."""
    with _parameters_on_meta():
        return build_uninitialised(source, source.dtype)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def as_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(as_meta)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _own(
    stored: Tensor, like: Tensor, name: str, source: ModelSource, device: torch.device, exact: bool
) -> Tensor:
    """Return stored values as `like`: a parameter that is packed in 4 bit, another one, or a
    buffer; in float32 if `exact`."""
    if is_quantised(like):
        packed = quantised(stored, like, device, source.dtype)
        require_quantised(name, stored, packed)
        return packed
    if stored.shape != like.shape:
        raise MegaskipError(
            f"{name} has shape {tuple(stored.shape)}, config.json asks for {tuple(like.shape)}"
        )
    dtype = torch.float32 if exact else like.dtype
    # A copy of its own: what is mapped from a file would be read again under memory pressure.
    own = torch.empty(like.shape, dtype=dtype, device=device).copy_(stored)
    return nn.Parameter(own, requires_grad=False) if isinstance(like, nn.Parameter) else own
