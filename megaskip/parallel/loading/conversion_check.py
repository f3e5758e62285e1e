"""Whether transformers can join and split stored tensors into a model's weights: tried on shapes.

Its own loader runs on tensors without numbers, so its rules hold and nothing is read.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights

from megaskip.checkpoint.stored_weights import StoredTensor
from megaskip.errors import CheckpointError, first_line
from megaskip.parallel.loading.source import ModelSource

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class _Shape:
    """What transformers' loader asks of a stored tensor; the answer has no numbers."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._empty = torch.empty(tensor.shape, dtype=_DTYPES.get(tensor.dtype), device="meta")

    def __getitem__(self, index: Any) -> "_Shape":
        return self

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor in another type, wherever it is asked for on the meta device."""
        return self._empty if dtype is None else self._empty.to(dtype)


def missing_after_conversion(
    source: ModelSource,
    model: Any,
    tensors: Iterable[StoredTensor],
    expected: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return those of the `expected` weights of `model`, by their names, that transformers does not
    make from the stored `tensors`.

    Raises CheckpointError for those of another shape, and where it fails.
    """
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    with_bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        # What is missing would be made, and initialised, in the CPU's memory.
        with no_init_weights():
            _, info = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict={tensor.name: _Shape(tensor) for tensor in tensors},
                dtype=source.dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{source.folder}: its tensors do not become those of {type(model).__name__} "
            f"({first_line(error)}); the files are not those of this config.json"
        ) from None
    finally:
        transformers.utils.logging.set_verbosity(level)
        if with_bar:
            transformers.utils.logging.enable_progress_bar()
    for name, stored, asked in sorted(info["mismatched_keys"], key=str):
        if name in expected:
            raise CheckpointError(
                f"{source.folder}: its tensors become {name} of shape {tuple(stored)}, config.json "
                f"asks for {tuple(asked)}; the files are not those of this config.json"
            )
    return {name: weight for name, weight in expected.items() if name in info["missing_keys"]}
