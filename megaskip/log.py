"""Logging of one run: the first rank speaks, the others only warn. Knows no process group."""

import logging
import os
import sys
import warnings

_FORMAT = "%(asctime)s %(message)s"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module."""
    return logging.getLogger(name)


def set_up_logging(*, rank: int) -> None:
    """Send megaskip's log to stdout: everything on rank 0, warnings with the rank's number
    elsewhere; libraries are quiet."""
    quiet_libraries()
    root = logging.getLogger("megaskip")
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stdout)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False


def quiet_libraries() -> None:
    """Keep the libraries' own chatter out of the run's log; errors still come through."""
    for name in (
        "DeepSpeed",
        "deepspeed",
        "transformers",
        "datasets",
        "filelock",
        "torch.distributed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
