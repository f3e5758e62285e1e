"""A base in 4 bit: which linear layers are, and how each weight is packed, as it is read.

bitsandbytes quantises and multiplies; transformers says which layers it would leave as they are.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from megaskip.errors import CheckpointError, UnsupportedModelError
from megaskip.extras import extra
from megaskip.parallel.loading.four_bit import FourBit

BLOCK = 64
"""Weights with one scale: bitsandbytes' default."""
_LARGEST_ERROR = 0.16
"""Of NF4, as a share of the largest number of a block: half of the widest gap between its levels,
-1 and -0.696 (bitsandbytes' create_normal_map), and a little for the type that is computed in."""


def quantise_linears(model: Any, dtype: torch.dtype, four_bit: FourBit) -> int:
    """Let the linear layers of a model on the meta device hold 4-bit weights, as `four_bit` says;
    returns how many. They compute in `dtype`.

    Those that are packed as they are read have rows of whole blocks. Raises MissingExtraError
    without bitsandbytes, UnsupportedModelError when no layer is linear.
    """
    bitsandbytes()
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=four_bit.quant_type,
        bnb_4bit_use_double_quant=four_bit.nested,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(model, _kept(model, four_bit), quantization_config=settings)
    layers = [module for module in model.modules() if is_quantised(getattr(module, "weight", None))]
    if not layers:
        why = "it has no linear layer that could be in 4 bit, as its folder says"
        if not four_bit.is_stored:
            why = "it has no linear layer that --base_dtype nf4 could quantise; leave it out"
        raise UnsupportedModelError(f"{model.config.model_type}: {why}")
    for layer in layers:
        # With it a layer that ran once without gradient packs its weights anew, and from then on
        # has no gradient, on CPUs that multiply bfloat16.
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def packed_names(model: Any, four_bit: FourBit) -> list[str]:
    """Return the names of the weights that `quantise_linears` would let be in 4 bit."""
    kept = _kept(model, four_bit)
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, kept)
    ]


def _kept(model: Any, four_bit: FourBit) -> list[str]:
    """Return the modules that stay as they are: of a packed folder, those that transformers takes
    from its config.json (HfQuantizer.get_modules_to_not_convert)."""
    own = four_bit.kept
    kept = [*((get_keys_to_not_convert(model) or ()) if own is None else own)]
    if four_bit.is_stored:
        return kept + list(getattr(model, "_keep_in_fp32_modules", None) or ())
    # On CPUs bitsandbytes 0.50 restores other numbers where rows are no whole blocks.
    ragged = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % BLOCK
    ]
    return kept + ragged


def is_quantised(parameter: Any) -> bool:
    """Return whether a parameter is one of bitsandbytes' 4-bit weights."""
    return type(parameter).__name__ == "Params4bit"


def quantised(stored: Tensor, like: Any, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Return stored values in 4 bit on `device`, as `like`, which has none, is set up; they are
    rounded to `dtype` first, as the 16-bit model's would be."""
    weight = bitsandbytes().nn.Params4bit(
        stored.to(device=device, dtype=dtype),
        requires_grad=False,
        quant_type=like.quant_type,
        blocksize=like.blocksize,
        compress_statistics=like.compress_statistics,
        quant_storage=like.quant_storage,
    )
    packed: nn.Parameter = weight.to(device)
    return packed


@torch.no_grad()
def require_quantised(name: str, stored: Tensor, packed: Any) -> None:
    """Raise CheckpointError unless the first and the last block of the 4-bit weight `name` are
    those of `stored`, to the rounding of its levels."""
    state = packed.quant_state
    first = min(state.blocksize, stored.numel())
    restored = bitsandbytes().functional.dequantize_4bit(packed.data, state).flatten()
    for start in (0, (stored.numel() - 1) // state.blocksize * state.blocksize):
        theirs = stored.flatten()[start : start + first].float()
        ours = restored[start : start + first].cpu().float()
        # Written so that NaN fails too.
        if not bool((ours - theirs).abs().max() <= _LARGEST_ERROR * theirs.abs().max()):
            raise CheckpointError(
                f"{name} in 4 bit is not what is stored; are its numbers finite? If so, please "
                "report this, and leave --base_dtype nf4 out"
            )


def bytes_of_packed(parameter: Any) -> int:
    """Return the bytes of the scales beside a 4-bit weight; 0 for other parameters."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    nested = int(state.state2.absmax.nbytes + state.state2.code.nbytes) if state.nested else 0
    return int(state.absmax.nbytes) + nested


def planned_bytes(parameter: Any) -> int:
    """Return the bytes that a parameter without values will take: packed if it is a 4-bit one, with
    a float32 scale for each block, or one of 8 bit and a float32 one for each 256 of these."""
    if not is_quantised(parameter):
        return int(parameter.numel() * parameter.element_size())
    packed, scales = (parameter.numel() + 1) // 2, -(-parameter.numel() // parameter.blocksize)
    if parameter.compress_statistics:
        return int(packed + scales + 4 * -(-scales // 256) + 4 * 256)
    return int(packed + 4 * scales)


def planned(model: nn.Module) -> tuple[int, int]:
    """Return (bytes that the weights of a model without values will take, elements of the largest
    4-bit one, of which a plain copy lives while it is multiplied)."""
    parameters = list(model.parameters())
    largest = max((p.numel() for p in parameters if is_quantised(p)), default=0)
    return sum(map(planned_bytes, parameters)), largest


@functools.cache
def bitsandbytes() -> Any:
    """Return the library; raises MissingExtraError where it is not installed."""
    with extra("4bit"):
        import bitsandbytes as library

    return library
