"""A Python that starts in milliseconds: each process is a fork of one that has imported torch and
transformers, which takes five seconds.

`WarmPython(folder).executable` takes the arguments of Python. Environment, folder, streams and exit
status are those of a process of its own, and nothing of megaskip is imported. The real Python runs
instead where a fork would not be the same: for other options than -c, -m and -u, and where a
variable differs that is read while the libraries are imported.

This file is server and client; a client imports small modules alone.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any

PRELOAD = ("torch", "safetensors.torch", "transformers.models.auto.modeling_auto")
PRELOAD += ("transformers.models.llama.modeling_llama", "transformers.generation", "peft")
READ_AT_IMPORT = ("HF_H", "HF_DATASETS_", "TRANSFORMERS_", "TORCHDYNAMO_", "TORCH_LOGS")
READ_AT_IMPORT += ("OMP_", "MKL_", "PYTHON", "CUDA", "DS_")
"""How the names of variables begin that the libraries read while they are imported."""
FOLLOWED = ("PYTHONPATH", "HF_MODULES_CACHE")
"""Variables of those that a fork follows nevertheless."""


class WarmPython:
    """The process that is forked; it ends when the process that started it has ended."""

    def __init__(self, folder: str) -> None:
        """Begin to import; the first client waits for the end of it."""
        import subprocess

        self.executable = os.path.join(folder, "python")
        with open(__file__) as source, open(self.executable, "w") as client:
            client.write(f"#!{sys.executable} -IS\n{source.read()}")
        os.chmod(self.executable, 0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{self.executable}.socket")
        listener.listen(64)
        lifeline, self._ends_with_us = os.pipe()
        handed_over = (listener.fileno(), lifeline)
        self._server = subprocess.Popen(
            [sys.executable, "-P", __file__, self.executable, *map(str, handed_over)],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            pass_fds=handed_over,
            start_new_session=True,
        )
        listener.close()
        os.close(lifeline)

    def close(self) -> None:
        """End the process; its forks run on."""
        os.close(self._ends_with_us)
        self._server.wait()


def be_python(arguments: list[str]) -> None:
    """Be what `python arguments` is, by a fork of the process behind this file."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{os.path.abspath(__file__)}.socket")
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(connection, [b"\0"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    answers = connection.makefile()
    if not (started := answers.readline()):
        sys.exit(f"the process behind {__file__} has ended; what it said last is why")
    pid = int(started)
    if pid == 0:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int(answers.readline())
    if status < 0:
        if -status in (signal.SIGINT, signal.SIGTERM):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(executable: str, listener: socket.socket, lifeline: int) -> None:
    """Import, then fork for each client. Returns in the forks alone, which then run their
    program."""
    environment = dict(os.environ)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.freeze()  # no fork copies what it only counts
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who answer clients leave no zombies
    while lifeline not in select.select([listener, lifeline], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            os.close(lifeline)
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(executable, client, environment)
            return
        client.close()
    os._exit(0)


def answer(executable: str, client: socket.socket, environment: dict[str, str]) -> None:
    """Fork for a client and tell it how the fork ends. Returns in the fork, ready to run."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile().readline())
    if not is_possible(request["arguments"], request["environment"], environment):
        client.sendall(b"0\n")
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        become(executable, request)
        return
    client.sendall(f"{pid}\n".encode())
    process = os.pidfd_open(pid)
    if process not in select.select([process, client], [], [])[0]:  # the client was killed
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def is_possible(arguments: list[str], asked: dict[str, str], given: dict[str, str]) -> bool:
    """Return whether a fork of what was imported with the environment `given` is what the client
    would be."""
    options = [word for word in arguments[:2] if word.startswith("-")]
    return (
        bool(arguments)
        and set(options) <= {"-c", "-m", "-u"}
        and all(
            asked.get(name) in (given.get(name), os.environ.get(name))  # imports add to it
            for name in asked.keys() | given.keys()
            if name.startswith(READ_AT_IMPORT) and name not in FOLLOWED
        )
    )


def become(executable: str, request: dict[str, Any]) -> None:
    """Take over the folder, the environment and the arguments of the client."""
    sys.executable = executable
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if cache := os.environ.get("HF_MODULES_CACHE"):
        sys.modules["transformers.dynamic_module_utils"].HF_MODULES_CACHE = cache  # type: ignore[attr-defined]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = request["arguments"]
    if sys.argv[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        del sys.argv[0]


def run_to_the_end() -> None:
    """Run what `sys.argv` says and end as Python would, but leave memory to the system, for taking
    all modules apart takes a second."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, int | None):
            status = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run() -> None:
    """Run what `sys.argv` says, as Python would."""
    kind, *rest = sys.argv
    if kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.realpath(kind)))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if __file__.endswith(".py"):
        serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
        run_to_the_end()
    else:
        be_python(sys.argv[1:])
