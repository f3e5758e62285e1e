"""Whether the ranks of this job can talk to each other, by gloo and, with GPUs, by NCCL."""

import socket
import time
from typing import Any

import torch
import torch.distributed as dist

from megaskip.errors import RankError
from megaskip.parallel.topology import Topology, process_group

_NUMBERS = 1 << 20
"""Length of the vector that is summed over ranks: 4 MiB."""
_TIMEOUT = 60
"""Seconds that a rank waits for the others."""


def backends() -> dict[str, Any]:
    """Return the communication libraries that torch was built with."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else False,
        "mpi": dist.is_mpi_available(),
        "cuda": torch.version.cuda or False,
    }


def measure_collectives(topology: Topology) -> dict[str, Any]:
    """Return nodes, ranks and seconds of an all-reduce of 4 MiB by backend. Collective.

    Raises RankError when ranks do not come, or a sum is wrong.
    """
    measured: dict[str, Any] = {"ranks": topology.world_size}
    with process_group(topology, timeout=_TIMEOUT):
        names: list[str | None] = [None] * topology.world_size
        dist.all_gather_object(names, socket.gethostname())
        measured["nodes"] = sorted({str(name) for name in names})
        seconds = {"gloo": _all_reduce_seconds(topology, torch.device("cpu"))}
        if topology.device.type == "cuda":
            seconds["nccl"] = _all_reduce_seconds(topology, topology.device)
    return measured | {"all_reduce_seconds": seconds}


def _all_reduce_seconds(topology: Topology, device: torch.device) -> float:
    """Return seconds of the second of two sums over ranks; the first one connects."""
    seconds = 0.0
    for _ in range(2):
        numbers = torch.full((_NUMBERS,), float(topology.rank + 1), device=device)
        begun = time.perf_counter()
        try:
            dist.all_reduce(numbers)
            total = float(numbers[-1])  # waits for the device
        except RuntimeError as error:
            raise RankError(
                f"rank {topology.rank} on {socket.gethostname()}: an all-reduce on {device.type} "
                f"failed ({error}); check the network between nodes (NCCL_SOCKET_IFNAME, "
                "GLOO_SOCKET_IFNAME)"
            ) from None
        seconds = time.perf_counter() - begun
        expected = topology.world_size * (topology.world_size + 1) / 2
        if total != expected:
            raise RankError(
                f"rank {topology.rank}: an all-reduce on {device.type} gave {total:g}, expected "
                f"{expected:g}; the communication library is broken on this system"
            )
    return round(seconds, 6)
