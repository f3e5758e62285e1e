"""The tensors of a safetensors file, all of them."""

from pathlib import Path

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from megaskip.errors import CheckpointError


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises CheckpointError when it is missing or
    damaged."""
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist")
    try:
        return load_file(file)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
