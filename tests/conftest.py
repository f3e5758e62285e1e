"""What holds for all tests."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True, scope="module")
def a_process_group_of_its_own() -> Iterator[None]:
    """Clear away the process group that a library has made in another file: transformers' trainers
    keep theirs until the process ends."""
    _leave_group()
    yield
    _leave_group()


def _leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
