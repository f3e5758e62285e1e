"""Which attention keeps the samples of packed rows apart, and the proof that it does. Knows no
engine."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

from megaskip.arch.compiled import COMPILER_ERRORS, in_short
from megaskip.errors import UnsupportedModelError
from megaskip.log import get_logger

logger = get_logger(__name__)

FLASH, FLEX = "flash_attention_2", "flex_attention"
_TOKENS = 12
"""Of a sample of the proof; two of them are a row."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the norm of the hidden states; TF32 rounds to 1e-3. A sample that sees the one before it
changes by tenths."""
_TOLERANCE_16_BIT = 5e-2


def takes_lengths(model: Any) -> bool:
    """Return whether the model's attention is told the lengths of packed samples, not a mask."""
    return "flash" in attention_of(model)


def attention_of(model: Any) -> str:
    """Return the name of the attention that a model runs with."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def choose_packed_attention(model: Any) -> None:
    """Set the fastest attention that keeps samples of packed rows apart on the model's device.

    On a GPU flash attention by the lengths of samples where it is installed, else flex attention,
    which leaves out blocks without a pair of the same sample; where neither can be had or run, and
    on a CPU, the family's own attention with a mask. Raises UnsupportedModelError when samples see
    each other in all of them. Under ZeRO-3 collective.
    """
    own = attention_of(model)
    for name in _faster(model):
        try:
            model.set_attn_implementation(name)
            if keeps_samples_apart(model):
                return
            problem = "samples see each other in it"
        # Not for this family, or not for heads of this size; flex attention is compiled, too.
        except COMPILER_ERRORS as error:
            problem = in_short(error)
        logger.info("packed rows do without %s (%s)", name, problem)
    model.set_attn_implementation(own)
    require_apart(model)


def require_apart(model: Any) -> None:
    """Raise UnsupportedModelError when samples of packed rows see each other. Under ZeRO-3
    collective."""
    if not keeps_samples_apart(model):
        raise UnsupportedModelError(
            f"{model.config.model_type}: samples of packed rows see each other in its attention "
            f"({attention_of(model)}); leave --packing out, or name another --attn_implementation"
        )


def describe_attention(model: Any, *, packing: bool) -> str:
    """Return which attention a model runs with, and how it takes packed rows, for the header."""
    name = attention_of(model)
    if not packing:
        return name
    if takes_lengths(model):
        return f"{name}, samples of packed rows by their lengths"
    blocks = "blocks of samples" if name == FLEX else "a mask of samples: slow on a GPU"
    return f"{name}, packed rows with {blocks}"


def _faster(model: nn.Module) -> Iterator[str]:
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return
    if is_flash_attn_2_available() and weight.dtype in (torch.float16, torch.bfloat16):
        yield FLASH
    yield FLEX


@torch.no_grad()
def keeps_samples_apart(model: Any) -> bool:
    """Return whether two samples in one row have the hidden states of two rows. Under ZeRO-3
    collective: every rank calls it."""
    decoder = model.get_decoder()
    device = next(tensor for tensor in (*model.parameters(), *model.buffers())).device
    ids = torch.arange(1, 2 * _TOKENS + 1, device=device).reshape(2, _TOKENS)
    places = torch.arange(_TOKENS, device=device).expand(2, _TOKENS)
    apart = decoder(input_ids=ids, position_ids=places, use_cache=False)[0].float()
    packed = decoder(
        input_ids=ids.reshape(1, -1),
        position_ids=places.reshape(1, -1),
        use_cache=False,
        **(_lengths(device) if takes_lengths(model) else {}),
    )[0].float()
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, _TOLERANCE_16_BIT)
    # Written so that NaN fails.
    return bool((packed.view_as(apart) - apart).norm() <= tolerance * apart.norm())


def _lengths(device: torch.device) -> dict[str, Tensor | int]:
    bounds = torch.arange(3, dtype=torch.int32, device=device) * _TOKENS
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": _TOKENS,
        "max_length_k": _TOKENS,
    }
