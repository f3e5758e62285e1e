"""A command in a process of its own, which may save what it has before it ends. Knows no ranks."""

import subprocess
from collections.abc import Mapping, Sequence

from megaskip.log import get_logger

logger = get_logger(__name__)


def run_child(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run a command to its end and return its status.

    A terminal sends Ctrl-C to both processes: the command saves, and this waits for it before it
    raises KeyboardInterrupt. Another Ctrl-C does not wait.
    """
    child = subprocess.Popen(command, env=env)
    try:
        return child.wait()
    except KeyboardInterrupt:
        logger.info("interrupted: waiting until the command above has saved and ended")
        try:
            child.wait()
        except KeyboardInterrupt:
            child.terminate()
        raise
