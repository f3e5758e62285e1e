"""Values of stored tensors: all of some, blocks of one, or two compared whole."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError, MegaskipError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLOCK = 4 << 20
"""Elements that are compared at once."""


def read_stored(folder: Path, wanted: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the wanted tensors by their names in `wanted`, file by file. They are mapped: of a
    tensor that is used in part, that part alone is read.

    Raises MegaskipError when a file cannot be read.
    """
    for file in sorted({tensor.file for tensor in wanted.values()}):
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for name, tensor in wanted.items():
                    if tensor.file == file:
                        yield name, handle.get_tensor(tensor.name)
        except (OSError, SafetensorError) as error:
            raise MegaskipError(f"{folder / file}: cannot read the weights ({error})") from None


def read_block(folder: Path, tensor: StoredTensor, start: int, count: int) -> Tensor:
    """Return elements [start, start + count) of a stored tensor, flattened, in its own type.

    Raises CheckpointError when they cannot be read.
    """
    dtype = DTYPES[tensor.dtype]
    path = folder / tensor.file
    try:
        with open(path, "rb") as reader:
            reader.seek(tensor.offset + start * dtype.itemsize)
            content = reader.read(count * dtype.itemsize)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) != count * dtype.itemsize:
        raise CheckpointError(f"{path} changed while it was read: {tensor.name} is cut off")
    return torch.frombuffer(bytearray(content), dtype=dtype)


def same_values(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two stored tensors of one shape hold the same numbers; stops at the first
    difference, and reads both whole without one."""
    if first.shape != second.shape:
        return False
    total = torch.Size(first.shape).numel()
    for start in range(0, total, _BLOCK):
        count = min(_BLOCK, total - start)
        ours, theirs = (read_block(folder, t, start, count) for t in (first, second))
        if not torch.equal(ours.double(), theirs.double()):
            return False
    return True
