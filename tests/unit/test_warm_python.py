"""The Python that tests start is a Python: streams, status, signals, and the real one where a fork
would differ."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("warm_python")
IS_WARM = "import sys; print('torch' in sys.modules)"


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run what the fixture puts at sys.executable."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_a_fork_has_torch_and_nothing_of_megaskip() -> None:
    code = "import sys; print({'torch', 'megaskip'} & {name.split('.')[0] for name in sys.modules})"
    assert python("-c", code).stdout == "{'torch'}\n"


def test_streams_folder_and_arguments_are_those_of_the_caller(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), sys.argv, input()); print('no', file=sys.stderr)"
    done = python("-c", code, "a", "-b", input="typed", cwd=str(tmp_path))
    assert done.stdout == f"{tmp_path} ['-c', 'a', '-b'] typed\n"
    assert done.stderr == "no\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("raise ValueError('no')", 1, "ValueError: no\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'last')", 0, "last"),
    ],
)
def test_it_ends_as_python_ends(code: str, status: int, said: str) -> None:
    done = python("-c", code)
    assert done.returncode == status
    assert done.stderr.endswith(said)


def test_scripts_and_modules_find_what_lies_beside_them(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("print(__name__)")
    (tmp_path / "script.py").write_text("import beside; print(__name__)")
    assert python(str(tmp_path / "script.py")).stdout == "beside\n__main__\n"
    assert python("-m", "beside", cwd=str(tmp_path)).stdout == "__main__\n"


def test_what_a_fork_cannot_be_is_run_by_the_real_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert python("-c", IS_WARM).stdout == "True\n"
    assert python("-P", "-c", IS_WARM).stdout == "False\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert python("-c", IS_WARM).stdout == "False\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_caller_ends_the_fork(number: int) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    fork = int(client.stdout.readline())
    os.kill(client.pid, number)
    assert client.wait() == -number
    deadline = time.monotonic() + 10
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < deadline, "the fork runs on"
        time.sleep(0.05)
