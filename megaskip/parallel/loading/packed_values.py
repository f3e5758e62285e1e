"""Weights that lie packed in a folder: read into bitsandbytes' form, and proven."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megaskip.errors import CheckpointError, MegaskipError
from megaskip.parallel.loading.loaded_values import require_same
from megaskip.parallel.loading.quantised import bitsandbytes
from megaskip.parallel.loading.weight_plan import PackedWeight, WeightPlan

_ROUNDING = 2.0**-7
"""Of a restored number in bfloat16, the coarsest type that weights are restored in."""


def read_packed(
    folder: Path, packed: Mapping[str, PackedWeight], device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each packed weight by the model's name, as a frozen 4-bit parameter on `device`.

    Raises MegaskipError when one cannot be read, CheckpointError when bitsandbytes does not restore
    it as it is stored.
    """
    with contextlib.ExitStack() as files:
        opened: dict[str, Any] = {}
        for name, stored in packed.items():
            tensors: dict[str, Tensor] = {}
            for suffix, tensor in {"": stored.weight, **stored.beside}.items():
                try:
                    if tensor.file not in opened:
                        reader = safe_open(folder / tensor.file, framework="pt")
                        opened[tensor.file] = files.enter_context(reader)
                    # A copy of its own, as stage_weights has them.
                    tensors[suffix] = opened[tensor.file].get_tensor(tensor.name).clone()
                except (OSError, SafetensorError) as error:
                    raise MegaskipError(
                        f"{folder / tensor.file}: cannot read the weights ({error})"
                    ) from None
            data = tensors.pop("")
            weight = bitsandbytes().nn.Params4bit.from_prequantized(
                data=data, quantized_stats=tensors, requires_grad=False, device=device
            )
            require_packed_as_stored(folder, name, stored, weight)
            yield name, weight


def require_loaded_packed(folder: Path, plan: WeightPlan, model: nn.Module) -> None:
    """Raise CheckpointError unless the 4-bit weights of `model`, by its own names, are those of the
    files in `folder`; which of them are plain, `require_loaded` looks at."""
    for name, stored in plan.packed.items():
        require_packed_as_stored(folder, name, stored, model.get_parameter(name))


@torch.no_grad()
def require_packed_as_stored(folder: Path, name: str, stored: PackedWeight, loaded: Any) -> None:
    """Raise CheckpointError unless `loaded`, the 4-bit parameter `name`, holds what the files do
    and is restored as its levels and scales say, in its first and its last block."""
    state = loaded.quant_state
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2)
        scales = scales + state.offset
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(
            f"{folder}: the scales of {stored.weight.name} are not finite (nan or inf); the model "
            "is broken, name another one"
        )
    require_same(folder, name, stored.weight, loaded.data)
    require_same(folder, f"{name}.absmax", stored.beside["absmax"], state.absmax)
    restored = bitsandbytes().functional.dequantize_4bit(loaded.data, state).flatten()
    size = stored.blocksize
    for block in (0, scales.numel() - 1):
        codes = loaded.data.flatten()[block * size // 2 : (block + 1) * size // 2].int()
        levels = state.code[torch.stack([codes >> 4, codes & 15], dim=1).flatten()]
        expected = levels.float() * scales[block].float()
        ours = restored[block * size : (block + 1) * size].float()
        # Written so that NaN fails too.
        if not bool((ours - expected).abs().max() <= _ROUNDING * expected.abs().max()):
            raise CheckpointError(
                f"{folder}: bitsandbytes restores other numbers from {stored.weight.name} than its "
                "levels and scales say; name another copy of the model, or the 16-bit one with "
                "--base_dtype nf4"
            )
