"""The ranks of a job: the only module that reads the launcher's environment and makes the process
group."""

import contextlib
import dataclasses
import datetime
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megaskip.config.value_types import shown
from megaskip.errors import ConfigError, RankError

LAUNCHER_VARIABLES = (
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "TORCHELASTIC_USE_AGENT_STORE",
)
"""What tells a process that it is a rank, and where the others are."""
_MEETING = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
"""What ranks cannot find each other without."""
_LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    num_stages: int = 1
    """Pipeline stages; the stages of a replica are neighbouring ranks, so that hidden states stay
    inside a node where they can. What replicas exchange is kilobytes."""
    sequence_size: int = 1
    """Ranks that share the tokens of the rows of a replica; they are neighbours for that reason,
    too."""

    @property
    def is_first(self) -> bool:
        """Return whether this rank writes files and logs."""
        return self.rank == 0

    @property
    def stage(self) -> int:
        """Return which slice of the layers this rank holds."""
        return self.rank % self.num_stages

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank computes losses."""
        return self.stage == self.num_stages - 1

    @property
    def replica(self) -> int:
        """Return which share of the data this rank sees."""
        return self.rank // self._ranks_of_replica

    @property
    def num_replicas(self) -> int:
        """Return how many shares the data are split into."""
        return self.world_size // self._ranks_of_replica

    @property
    def sequence_rank(self) -> int:
        """Return which share of the tokens of each row this rank computes."""
        return self.rank % self.sequence_size

    @property
    def _ranks_of_replica(self) -> int:
        return self.num_stages * self.sequence_size


def read_topology(
    environment: Mapping[str, str], *, num_stages: int = 1, sequence_size: int = 1
) -> Topology:
    """Return the topology that torchrun or the deepspeed launcher describes in `environment`; that
    of one process without them.

    Raises ConfigError when the ranks cannot form replicas of `num_stages` stages, or groups of
    `sequence_size` ranks that share rows, and where there is no GPU for this one.
    """
    local_rank = _number(environment, "LOCAL_RANK", 0)
    rank = _number(environment, "RANK", 0)
    world_size = _number(environment, "WORLD_SIZE", 1)
    if not rank < world_size:
        raise ConfigError(
            f"the launcher set RANK to {rank} and WORLD_SIZE to {world_size}; ranks are counted "
            "from 0 and lie below the world size"
        )
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"this is rank {local_rank} of its node (LOCAL_RANK), and it sees "
            f"{torch.cuda.device_count()} GPU(s); start no more ranks on a node than it has GPUs, "
            "and let each of them see all (no CUDA_VISIBLE_DEVICES by rank, no --gpus-per-task)"
        )
    if world_size % num_stages:
        raise ConfigError(
            f"--pipeline_stages {num_stages} does not divide the {world_size} rank(s) of this "
            f"job; start a multiple of {num_stages}, or choose another number of stages"
        )
    if world_size % sequence_size:
        raise ConfigError(
            f"--sequence_parallel_size {sequence_size} does not divide the {world_size} rank(s) of "
            f"this job; start a multiple of {sequence_size}, or {sizes_of_ranks(world_size)}"
        )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
        num_stages=num_stages,
        sequence_size=sequence_size,
    )


def sizes_of_ranks(world_size: int) -> str:
    """Return what to do about a --sequence_parallel_size that does not divide the ranks."""
    return sizes_that(lambda size: world_size % size == 0, most=world_size)


def sizes_that(fit: Callable[[int], bool], *, most: int) -> str:
    """Return which --sequence_parallel_size to take, of those up to `most` that `fit`."""
    sizes = [str(size) for size in range(2, most + 1) if fit(size)]
    return f"take one of {', '.join(sizes)}" if sizes else "leave the flag out"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return a whole number that a launcher has set; raises ConfigError for anything else."""
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(
            f"the environment variable {name} is {shown(text)}, expected a whole number; start "
            "with torchrun or deepspeed, which set it, or remove it"
        )
    return int(text)


def alone(topology: Topology) -> Topology:
    """Return this rank as a job of one process on the same device, for ranks that share out whole
    tasks instead of batches.

    Takes what the launcher set out of the environment, so that process groups and programs that are
    started from here do not count the other ranks.
    """
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    return dataclasses.replace(topology, rank=0, world_size=1, num_stages=1, sequence_size=1)


def current_topology() -> Topology:
    """Return this process's place in the open process group; alone without one."""
    is_open = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_open else (0, 1)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    local_rank = device.index or 0
    return Topology(rank=rank, world_size=world_size, local_rank=local_rank, device=device)


@contextlib.contextmanager
def process_group(topology: Topology, *, timeout: int) -> Iterator[None]:
    """Hold the default process group open; `timeout` in seconds. Collective.

    Raises RankError when not every rank comes within that time.
    """
    if topology.device.type == "cuda":
        torch.cuda.set_device(topology.device)
    missing = [name for name in _MEETING if not os.environ.get(name)]
    if topology.world_size == 1 and missing:
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()), RANK="0", WORLD_SIZE="1"
        )
    elif missing:
        raise ConfigError(
            f"{topology.world_size} ranks are asked for, but the environment lacks "
            f"{', '.join(missing)}; start with torchrun or deepspeed, which set it"
        )
    port = _number(os.environ, "MASTER_PORT", 0)
    if port == 0 or port > _LAST_PORT:
        raise RankError(
            f"MASTER_PORT is {port}, which no rank can connect to; start torchrun with "
            "--standalone, or with --master_port and a free port"
        )
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))
    backend = "cpu:gloo,cuda:nccl" if topology.device.type == "cuda" else "gloo"
    try:
        if not topology.is_first:
            _wait_for_port(os.environ["MASTER_ADDR"], port, timeout)
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError, ConnectionError) as error:
        raise RankError(
            f"rank {topology.rank} of {topology.world_size} waited {timeout} s for the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} in vain ({error}); check "
            "that every rank was started with the same address and world size"
        ) from None
    failed = True
    try:
        yield
        failed = False
    finally:
        # The ranks of a node destroy their NCCL communicators together (ncclCommDestroy): after an
        # error this one would wait there for others, who wait for it in a collective, and nobody
        # would read what went wrong. The group ends with the process then.
        if not (failed and topology.world_size > 1 and topology.device.type == "cuda"):
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _wait_for_port(address: str, port: int, timeout: float) -> None:
    """Wait until somebody listens where ranks meet; raises TimeoutError after `timeout` seconds.

    torch's own client tries again, for several times its timeout, when the first rank is dead.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(error.strerror or str(error)) from None
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
