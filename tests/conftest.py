"""What holds for all tests."""

import logging
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from warm_python import WarmPython


@pytest.fixture(autouse=True, scope="module")
def a_process_group_of_its_own() -> Iterator[None]:
    """Clear away the process group that a library has made in another file: transformers' trainers
    keep theirs until the process ends."""
    _leave_group()
    yield
    _leave_group()


@pytest.fixture(autouse=True)
def a_log_that_no_command_has_set_up() -> None:
    """Take back what commands of earlier tests did to the log of their process: which files share a
    process is chance, and caplog of pytest before 9.2 hears nothing after such a command."""
    ours = logging.getLogger("megaskip")
    ours.handlers.clear()
    ours.propagate = True
    ours.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def own_modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the code that exported folders bring along a place of its own for a file's tests."""
    import transformers

    cache = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


@pytest.fixture(scope="session")
def warm_executable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return what runs as Python does, without seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        warm = WarmPython(str(tmp_path_factory.mktemp("warm")))
    yield warm.executable
    warm.close()


@pytest.fixture(scope="module")
def warm_python(warm_executable: str) -> Iterator[None]:
    """Let the processes that a file's tests start, and those that commands start, be forks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_executable)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def _leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
