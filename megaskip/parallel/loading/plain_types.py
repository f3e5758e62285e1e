"""Refuses weights that are numbers in a packed form: quantised ones, their scales, their settings.

Those in the 4 bit of bitsandbytes that config.json describes are packed_check.py's. All others are
refused on every engine alike: transformers would unpack some of them in one process, on some
devices, and our readers would take the packed numbers for weights.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError
from megaskip.parallel.loading.four_bit import (
    describe_bitsandbytes,
    is_bitsandbytes,
    stored_four_bit,
)

PLAIN = {"F64", "F32", "F16", "BF16"}
"""Types of stored numbers that are weights as they are."""
_PLAIN_DTYPES = {"float64", "float32", "float16", "bfloat16", "auto"}
"""Types of weights that config.json may name."""
_SETTINGS = ("quantization_config", "compression_config")
_PACKED = re.compile(
    r"([._](qweight|qzeros|g_idx|scales?|zeros|SCB|absmax|nested_absmax|quant_map|nested_quant_map"
    r"|weight_format|codebooks?|qdata|trellis|blocks|weight_(scale(_inv|_2)?|packed|shape"
    r"|zero_point|g_idx)|(input|output|[kv])_scale)|\.quant_state\..+)$"
)
"""Names of what lies beside packed numbers: GPTQ, AWQ, bitsandbytes, float8, MXFP4, HQQ."""


def require_plain_config(folder: Path) -> None:
    """Raise CheckpointError when a model's config.json says that its weights are quantised, other
    than in the 4 bit of bitsandbytes, or that they are in another file than transformers takes by
    itself."""
    content = read_json(folder / "config.json")
    for settings in (content, *(v for v in content.values() if isinstance(v, dict))):
        for key in _SETTINGS:
            is_read = settings is content and key == "quantization_config"
            if is_read and stored_four_bit(settings.get(key)) is not None:
                continue
            if settings.get(key):
                raise _quantised(folder, f"config.json has a {key}{_method(settings[key])}")
        dtype = settings.get("dtype") or settings.get("torch_dtype")
        if isinstance(dtype, str) and dtype.removeprefix("torch.") not in _PLAIN_DTYPES:
            raise _quantised(folder, f"config.json says their type is {dtype}")
    if content.get("transformers_weights"):
        raise CheckpointError(
            f"{folder / 'config.json'} names its weights by transformers_weights, which is not "
            "supported; rename the files as save_pretrained does, and remove the entry"
        )


def require_plain_names(folder: Path, extra: Iterable[str]) -> None:
    """Raise CheckpointError when one of the stored tensors that are none of the model's weights is
    the companion of packed weights."""
    for name in extra:
        if _PACKED.search(name):
            raise _quantised(folder, f"the files hold {name}")


def require_plain_types(
    folder: Path, name: str, tensors: Iterable[StoredTensor], *, is_floating: bool
) -> None:
    """Raise CheckpointError when the model's weight `name`, floating-point or not, cannot be filled
    from `tensors` as they are."""
    for tensor in tensors:
        if is_floating and tensor.dtype not in PLAIN:
            raise _quantised(folder, f"{tensor.name} is stored as {tensor.dtype}")
        if not is_floating and tensor.dtype in PLAIN:
            raise CheckpointError(
                f"{folder}: {tensor.name} is stored as {tensor.dtype}, the model's {name} has "
                "whole numbers; the files are not those of this config.json"
            )


def _quantised(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: its weights are quantised ({why}), which no engine of megaskip loads; name the "
        "16-bit model (with --base_dtype nf4 if it is to be in 4 bit), or dequantize this one once "
        "with transformers and save_pretrained it"
    )


def _method(settings: Any) -> str:
    if is_bitsandbytes(settings):
        return f", {describe_bitsandbytes(settings)}"
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return f", {method}" if method else ""
