"""The gate for weights that bitsandbytes has packed in 4 bit: what lies beside each of them, read
from headers and from the few bytes in which it describes itself."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError
from megaskip.parallel.loading.four_bit import QUANT_TYPES, FourBit
from megaskip.parallel.loading.plain_types import PLAIN
from megaskip.parallel.loading.stored_values import read_block
from megaskip.parallel.loading.weight_plan import PackedWeight

STATE = "quant_state.bitsandbytes__"
"""What follows a weight's name, with the quant type, in that of the JSON that describes it."""
_SCALES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_COMPANIONS = (*_SCALES, *(STATE + kind for kind in QUANT_TYPES))
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Of bitsandbytes' quantize_4bit."""
_NESTED_BLOCKSIZE = 256
"""The only one that bitsandbytes multiplies with (matmul_4bit)."""
_DTYPES = ("float32", "float16", "bfloat16")
_LONGEST_STATE = 4096
NOT_OF_THE_CONFIG = "the files are not those of this config.json"

Beside = Mapping[str, Mapping[str, StoredTensor]]
"""What lies beside each weight, by its stored name and by what follows that in the other's."""
NOTHING_BESIDE: Beside = {}


def without_companions(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], Beside]:
    """Return (tensors that are weights or become none, what lies beside those that are packed)."""
    weights: dict[str, StoredTensor] = {}
    beside: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.partition(".weight.")
        if last in _COMPANIONS:
            beside.setdefault(f"{owner}.weight", {})[last] = tensor
        else:
            weights[name] = tensor
    return weights, beside


def require_packed(
    folder: Path,
    four_bit: FourBit,
    asked: Mapping[str, Tensor],
    direct: Mapping[str, tuple[StoredTensor, ...]],
    beside: Beside,
) -> dict[str, PackedWeight]:
    """Return where each packed weight lies, by the model's names: `asked` are those that
    config.json has in 4 bit, without values; `direct` the stored tensor of each weight.

    Raises CheckpointError for one that is not packed, misshapen, or without what it is restored
    from, and for one that is packed and should not be.
    """
    for name, tensors in direct.items():
        if name not in asked and tensors[0].name in beside:
            raise CheckpointError(
                f"{folder}: {tensors[0].name} is packed in 4 bit, and config.json does not say so "
                f"(quantization_config, llm_int8_skip_modules); {NOT_OF_THE_CONFIG}"
            )
    return {
        name: _packed(folder, four_bit, direct[name][0], beside, tuple(weight.shape))
        for name, weight in asked.items()
        if name in direct
    }


def require_plain_head(folder: Path, model: Any, asked: Collection[str]) -> None:
    """Raise CheckpointError when config.json has the output embedding of `model` in 4 bit."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and f"{name}.weight" in asked:
            raise CheckpointError(
                f"{folder}: config.json has {name}.weight in 4 bit (llm_int8_skip_modules does not "
                "name it), from which no loss is computed here; quantise the model again with "
                f"{name} in llm_int8_skip_modules"
            )


def _packed(
    folder: Path, four_bit: FourBit, weight: StoredTensor, beside: Beside, shape: tuple[int, ...]
) -> PackedWeight:
    if weight.dtype in PLAIN:
        raise CheckpointError(
            f"{folder}: {weight.name} is stored as {weight.dtype}, and config.json says that it is "
            "in 4 bit (quantization_config); remove that entry if the model is in 16 bit, or name "
            "the right folder"
        )
    companions = beside.get(weight.name, {})
    numbers = math.prod(shape)
    _require(folder, weight, "U8", ((numbers + 1) // 2, 1), f"two of {numbers} weights a byte")
    state = _state(folder, weight, companions, four_bit, shape)
    blocksize = state["blocksize"]
    if shape[-1] % blocksize:
        raise CheckpointError(
            f"{folder}: rows of {weight.name} have {shape[-1]} numbers, which are no whole blocks "
            f"of {blocksize}: bitsandbytes restores other numbers from them on CPUs; name the "
            "16-bit model with --base_dtype nf4, which leaves such layers as they are"
        )
    blocks, nested = numbers // blocksize, "nested_blocksize" in state
    wanted = {"absmax": ("U8" if nested else "F32", (blocks,)), "quant_map": ("F32", (16,))}
    if nested:
        wanted["nested_absmax"] = ("F32", (-(-blocks // _NESTED_BLOCKSIZE),))
        wanted["nested_quant_map"] = ("F32", (256,))
    for suffix, (dtype, size) in wanted.items():
        tensor = _companion(folder, weight, companions, suffix)
        _require(folder, tensor, dtype, size, f"a scale for each {blocksize} weights")
    kept = {suffix: companions[suffix] for suffix in (*wanted, STATE + four_bit.quant_type)}
    return PackedWeight(weight=weight, beside=kept, shape=shape, blocksize=blocksize)


def _companion(
    folder: Path, weight: StoredTensor, companions: Mapping[str, StoredTensor], suffix: str
) -> StoredTensor:
    if suffix not in companions:
        raise CheckpointError(
            f"{folder}: no stored tensor is {weight.name}.{suffix}, without which {weight.name} in "
            "4 bit is no weight; copy or download the model again"
        )
    return companions[suffix]


def _require(
    folder: Path, tensor: StoredTensor, dtype: str, shape: tuple[int, ...], why: str
) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise CheckpointError(
            f"{folder}: {tensor.name} is {tensor.dtype} of shape {tensor.shape}, expected {dtype} "
            f"of {shape} ({why}, by config.json); {NOT_OF_THE_CONFIG}"
        )


def _state(
    folder: Path,
    weight: StoredTensor,
    companions: Mapping[str, StoredTensor],
    four_bit: FourBit,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Return what a packed weight says of itself, once all of it is what can be read."""
    tensor = _companion(folder, weight, companions, STATE + four_bit.quant_type)
    state = _description(folder, tensor)
    allowed = _allowed(four_bit, shape, nested="nested_blocksize" in state)
    keys = {*allowed, "nested_offset"} if "nested_blocksize" in state else {*allowed}
    for key in sorted(state.keys() ^ keys):
        said = "says" if key in state else "does not say"
        raise CheckpointError(
            f"{folder}: {tensor.name} {said} {key}, expected {', '.join(sorted(keys))}; the model "
            "is broken, or packed by a bitsandbytes that is not known here"
        )
    for key, values in allowed.items():
        # 64.0 is equal to 64, and no size.
        if repr(state[key]) not in map(repr, values):
            raise CheckpointError(
                f"{folder}: {tensor.name} says {key} {state[key]!r}, expected "
                f"{' or '.join(map(str, values))}; {NOT_OF_THE_CONFIG}"
            )
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(
            f"{folder}: {tensor.name} says nested_offset {offset!r}, expected a number; the model "
            "is broken, name another one"
        )
    return state


def _description(folder: Path, tensor: StoredTensor) -> dict[str, Any]:
    """Return the JSON object that is stored in a tensor of bytes."""
    length = math.prod(tensor.shape)
    try:
        if tensor.dtype != "U8" or not 0 < length <= _LONGEST_STATE:
            raise ValueError("it is no text")
        state = json.loads(bytes(read_block(folder, tensor, 0, length).tolist()).decode())
        if not isinstance(state, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder}: {tensor.name} is no description of a packed weight ({error}); copy or "
            "download the model again"
        ) from None
    return state


def _allowed(
    four_bit: FourBit, shape: tuple[int, ...], *, nested: bool
) -> dict[str, Sequence[Any]]:
    """Return the values that each entry of a description may have, but for nested_offset."""
    allowed: dict[str, Sequence[Any]] = {
        "quant_type": (four_bit.quant_type,),
        "blocksize": _BLOCKSIZES,
        "dtype": _DTYPES,
        "shape": (list(shape),),
    }
    if nested:
        allowed |= {"nested_blocksize": (_NESTED_BLOCKSIZE,), "nested_dtype": ("float32",)}
    return allowed
