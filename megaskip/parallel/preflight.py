"""What must be alike and enough on every rank, checked before any weight is loaded.

One table when all is well; else one error that names the node.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaskip.arch.adapters import find_adapted_layers
from megaskip.arch.experts import routed_experts
from megaskip.checkpoint.resume import checkpoints
from megaskip.checkpoint.weight_index import INDEX, SINGLE, read_weight_map
from megaskip.config import RunConfig, resolve_layers
from megaskip.errors import RankError
from megaskip.parallel.loading.quantised import planned
from megaskip.parallel.loading.skeleton import quantised_skeleton, skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology
from megaskip.routing import RouterSet

_SPARE = 1.1
"""Weights need room for themselves and a little more; activations are planned by --dry_run."""
_SMALL_FILES = 64 << 20
"""Bytes of a run folder beside its checkpoints: metrics, events, pictures."""
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank sees on its node."""

    rank: int
    node: str
    device: str
    visible_devices: int
    free_memory: int
    """Bytes free where the weights will live: on the rank's GPU, or on the node."""
    shares_memory: bool
    """It is the node's, whose other ranks need theirs of it, too."""
    free_disk: int
    """Bytes free in the run folder, as this node sees it; -1 where it does not see it."""
    versions: Mapping[str, str]
    config: str
    """Fingerprint of every setting."""
    data: str
    model: str

    @property
    def label(self) -> str:
        """Return the rank and its node, for messages."""
        return f"rank {self.rank} on node {self.node}"


def preflight(
    config: RunConfig,
    topology: Topology,
    output_dir: Path,
    source: ModelSource,
    data_fingerprint: str,
    versions: Mapping[str, str],
    ds_content: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """Return the rows of the table of nodes; raises RankError on every rank. Collective.

    `ds_content` is the DeepSpeed JSON, empty without one.
    """
    offload = ds_content.get("zero_optimization", {}).get("offload_param", {}).get("device")
    on_gpu = topology.device.type == "cuda" and offload in (None, "none")
    mine = Report(
        rank=topology.rank,
        node=socket.gethostname(),
        device=_device_name(topology.device),
        visible_devices=torch.cuda.device_count() if topology.device.type == "cuda" else 0,
        free_memory=free_memory(topology.device if on_gpu else torch.device("cpu")),
        shares_memory=not on_gpu,
        free_disk=shutil.disk_usage(output_dir).free if output_dir.is_dir() else -1,
        versions=versions,
        config=_hash(dataclasses.asdict(config)),
        data=data_fingerprint,
        model=_hash(_model_files(source.folder)),
    )
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, mine)
    weights = _weight_bytes(source.folder)
    if source.four_bit is not None:
        weights, _ = planned(quantised_skeleton(source))
    shares = topology.num_stages
    if shares == 1 and config.parallel.ds_config is not None:
        shares = topology.world_size
    # What lives on disk needs no memory that could be told beforehand.
    problems = find_problems(
        everyone,
        weights_per_rank=0 if offload == "nvme" else weights // shares,
        run_folder=_SMALL_FILES + checkpoint_bytes(config, source, output_dir),
    )
    if problems:
        raise RankError("before loading weights: " + "\n  ".join(problems))
    return [(node, _node_line(reports)) for node, reports in _by_node(everyone).items()]


def checkpoint_bytes(config: RunConfig, source: ModelSource, output_dir: Path) -> int:
    """Return the bytes of the checkpoints that a run will add to its folder: float32 weights, and
    two moments of what trains."""
    if config.model.train == "full":
        stored = getattr(source.hf_config, "dtype", None) or torch.float32
        saved = trained = _weight_bytes(source.folder) // stored.itemsize
    else:
        text = source.text_config
        layers = resolve_layers(config.router.layers, text.num_hidden_layers)
        experts, meta = routed_experts(config.router, source.hf_config), torch.device("meta")
        size = text.hidden_size
        routers = RouterSet(config.router, layers, size, experts=experts, device=meta)
        saved = sum(parameter.numel() for parameter in routers.parameters())
        trained = sum(parameter.numel() for parameter in routers.trained_parameters().values())
        adapters = _adapter_numel(config, source)
        saved, trained = saved + adapters, trained + adapters
    # An old checkpoint is removed when a new one is complete.
    at_once = config.checkpoint.keep_last + 1 if config.checkpoint.save_every else 1
    return (4 * saved + 8 * trained) * max(at_once - len(checkpoints(output_dir)), 1)


def _adapter_numel(config: RunConfig, source: ModelSource) -> int:
    if not config.adapter.lora_rank:
        return 0
    layers = find_adapted_layers(skeleton(source), config.adapter)
    return config.adapter.lora_rank * sum(x.in_features + x.out_features for x in layers)


def find_problems(
    reports: Sequence[Report], *, weights_per_rank: int, run_folder: int
) -> list[str]:
    """Return what differs between ranks or is too little, one line each, naming the node.

    `weights_per_rank` and `run_folder` are the bytes that weights need in memory, and the run on
    disk.
    """
    problems = []
    for name in reports[0].versions:
        problems += _minority(reports, name, functools.partial(_version, name))
    problems += _minority(reports, "the settings (flags, --config)", lambda report: report.config)
    problems += _minority(reports, "the training data", lambda report: report.data)
    problems += _minority(reports, "the model's files", lambda report: report.model)
    problems += _minority(reports, "the device", lambda report: report.device)
    for node, of_node in _by_node(reports).items():
        ranks = len(of_node) if of_node[0].shares_memory else 1
        free = min(report.free_memory for report in of_node)
        needed = int(_SPARE * weights_per_rank * ranks)
        if free < needed:
            problems.append(
                f"node {node}: {_gib(free)} of memory free, the weights of its ranks need "
                f"{_gib(needed)}; use more ranks, or --ds_config with ZeRO-3"
            )
        if of_node[0].rank == 0 and of_node[0].free_disk < run_folder:
            problems.append(
                f"node {node}: {_gib(of_node[0].free_disk)} of disk free for --output_dir, its "
                f"checkpoints need {_gib(run_folder)}; name another folder, or keep fewer "
                "(--keep_last)"
            )
    return problems


def _minority(
    reports: Sequence[Report], what: str, value: Callable[[Report], Hashable]
) -> list[str]:
    """Return one line if not all ranks have the same value, naming those in the minority."""
    counts = Counter(value(report) for report in reports)
    if len(counts) == 1:
        return []
    usual = counts.most_common(1)[0][0]
    odd = [f"{report.label} has {value(report)}" for report in reports if value(report) != usual]
    return [f"{what} must be the same everywhere: {'; '.join(odd)}, the others have {usual}"]


def _version(name: str, report: Report) -> str | None:
    return report.versions.get(name)


def _by_node(reports: Sequence[Report]) -> dict[str, list[Report]]:
    nodes: dict[str, list[Report]] = {}
    for report in reports:
        nodes.setdefault(report.node, []).append(report)
    return nodes


def _node_line(reports: Sequence[Report]) -> str:
    first = reports[0]
    ranks = f"{first.rank}-{reports[-1].rank}" if len(reports) > 1 else f"{first.rank}"
    devices = f"{first.visible_devices} x {first.device}" if first.visible_devices else first.device
    disk = "not seen here" if first.free_disk < 0 else f"{_gib(first.free_disk)} free"
    memory = _gib(min(report.free_memory for report in reports))
    return f"ranks {ranks}, {devices}, memory {memory} free, run folder {disk}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        line = next(line for line in text.splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _model_files(folder: Path) -> list[tuple[str, int, str]]:
    """Return name, size and a hash of the head of every file that makes the model."""
    names = ("*.safetensors", INDEX, "config.json")
    files = sorted(file for name in names for file in folder.glob(name) if file.is_file())
    return [(f.name, f.stat().st_size, _head(f)) for f in files]


def _head(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.sha256(handle.read(_HEADER_BYTES)).hexdigest()


def _weight_bytes(folder: Path) -> int:
    index = folder / INDEX
    files = set(read_weight_map(index).values()) if index.is_file() else {SINGLE}
    return sum((folder / file).stat().st_size for file in files if (folder / file).is_file())


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
