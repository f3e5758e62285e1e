"""The process that runs parts, one after the other, and sends rows as they come.

Its death is no part of a report's: megaskip.bench.runner starts another one.
"""

import os
import platform
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megaskip.bench.memory import free
from megaskip.bench.parts import CPU, Part
from megaskip.bench.peaks import copy_bandwidth, matmul_flops
from megaskip.bench.sanity import check_routing, check_zero3
from megaskip.bench.serving import measure_serving
from megaskip.bench.setup import Setup, Snapshots
from megaskip.bench.training import measure_training
from megaskip.errors import MegaskipError, first_line
from megaskip.log import quiet_libraries

READY, ROWS, DONE, FAILED = "ready", "rows", "done", "failed"
"""First word of a message; ROWS and FAILED carry the rows so far and the reason."""


def work(connection: Connection, device_name: str, log: Path) -> None:
    """Run the parts that come through `connection` as (part, seconds, speeds) until None comes.

    Ends after a part that failed: the next one gets a fresh process. What it and the libraries
    print goes to the end of `log`.
    """
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if device_name == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
    os.environ["HF_HUB_OFFLINE"] = "1"
    quiet_libraries()
    device = torch.device("cpu" if device_name == CPU else "cuda:0")
    dtype = torch.float32 if device_name == CPU else torch.bfloat16
    torch.zeros((), device=device)
    connection.send((READY, None))
    while (job := connection.recv()) is not None:
        part, seconds, speeds = job
        until = time.monotonic() + seconds
        setup = Setup(device=device, dtype=dtype, speeds=speeds, until=until)
        failure = _attempt(part, setup, connection)
        free()
        connection.send((DONE, None) if failure is None else (FAILED, failure))
        if failure is not None or part.kind == "zero3":
            return


def _attempt(part: Part, setup: Setup, connection: Connection) -> str | None:
    """Run a part and send its rows; return why it failed, if it did."""
    try:
        for rows in _MEASURES[part.kind](part, setup):
            connection.send((ROWS, rows))
    except torch.OutOfMemoryError:
        return "out of memory"
    except (MegaskipError, RuntimeError, ImportError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def machine(part: Part, setup: Setup) -> Snapshots:
    """Yield the device's name, memory and measured peaks."""
    device = setup.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    row: dict[str, Any] = {"table": "machine", "device": name, "memory_bytes": memory}
    row |= {"dtype": str(setup.dtype).removeprefix("torch."), "cuda": torch.version.cuda}
    row |= {"flops": matmul_flops(setup.watch, setup.dtype)}
    row |= {"bandwidth": copy_bandwidth(setup.watch)}
    row |= {"clock": "CPU time" if setup.counts_cpu_time else "wall time"}
    yield [row]


_MEASURES = {
    "machine": machine,
    "routing": check_routing,
    "zero3": check_zero3,
    "train": measure_training,
    "serve": measure_serving,
}
