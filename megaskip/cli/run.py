"""How an entry point ends: its errors become one message and a status, never a traceback."""

import os
import sys
import time
from collections.abc import Callable, Sequence

from megaskip.errors import MegaskipError

_USER_ERROR = 2
_INTERRUPTED = 130
"""What shells show for a program that Ctrl-C has ended."""
_PIPE_CLOSED = 141
"""What shells show for a program that SIGPIPE has ended."""
_FIRST_SPEAKS = 3.0
"""Seconds that other ranks leave the first one to print an error that all of them have found."""


def run_cli(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str] | None = None,
    *,
    after_interrupt: str = "",
) -> None:
    """Run an entry point on `argv` (sys.argv without its first); a MegaskipError ends it with one
    message and status 2, Ctrl-C with one and status 130, no traceback.

    `after_interrupt` says how an interrupted command goes on, "" if it begins anew.
    """
    rank = os.environ.get("RANK", "0")
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `megaskip ... | head` has read enough
        os._exit(_PIPE_CLOSED)
    except KeyboardInterrupt:
        if rank == "0":
            hint = f"; {after_interrupt}" if after_interrupt else ""
            print(f"\ninterrupted by Ctrl-C{hint}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(_INTERRUPTED)
    except MegaskipError as error:
        if rank != "0":
            time.sleep(_FIRST_SPEAKS)
        name = f"[rank {rank}] " if rank != "0" else ""
        print(f"{name}error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: threads of a process group in an undefined state could keep the process.
        sys.stdout.flush()
        os._exit(_USER_ERROR)
