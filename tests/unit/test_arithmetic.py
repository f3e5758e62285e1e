"""What a process is set up for before weights are read: TF32 on a GPU, DeepSpeed without trials."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch

from megaskip.config import RunConfig
from megaskip.parallel.loading.source import choose_arithmetic
from megaskip.parallel.topology import Topology
from megaskip.parallel.zero3 import prepare_deepspeed
from megaskip.training.header import _engine_text

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float32, GPU, "high"),
        (torch.bfloat16, GPU, "highest"),  # routers stay in float32
        (torch.float32, CPU, "highest"),
    ],
)
def test_float32_on_a_gpu_is_tf32_and_the_header_says_so(
    dtype: torch.dtype, device: torch.device, expected: str
) -> None:
    choose_arithmetic(dtype, device)
    assert torch.get_float32_matmul_precision() == expected
    engine: Any = SimpleNamespace(module=torch.nn.Linear(1, 1, dtype=dtype))
    topology = Topology(rank=0, world_size=1, local_rank=0, device=device)
    text = _engine_text(RunConfig(), topology, engine)
    assert ("TF32" in text) == (expected == "high"), text


def test_deepspeed_is_prepared_without_trying_out_its_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ops: Any = deepspeed.ops
    monkeypatch.delitem(vars(ops), "__compatible_ops__", raising=False)
    prepare_deepspeed()
    assert vars(ops)["__compatible_ops__"] == {"deepspeed_shm_comm": False}
