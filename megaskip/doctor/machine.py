"""Libraries, processors, memory and disk of this machine, as plain values."""

import contextlib
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = {
    # Library: the extra of megaskip that installs it; None for what every command needs.
    "torch": None,
    "transformers": None,
    "safetensors": None,
    "tokenizers": None,
    "huggingface_hub": None,
    "numpy": None,
    "deepspeed": "train",
    "datasets": "train",
    "accelerate": "train",
    "sentencepiece": "train",
    "tensorboard": "train",
    "lm_eval": "eval",
    "matplotlib": "report",
}
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "LOCAL_SIZE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "SLURM_JOB_ID",
)
_PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_")
"""Never all variables: tokens and passwords are among them, and reports are made public."""
_BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


def software() -> dict[str, str]:
    """Return the versions of Python and the libraries; "not installed" for those that are not."""
    versions = {"python": platform.python_version()}
    for name in ("megaskip", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def processor() -> dict[str, Any]:
    """Return what computes on the CPU, and how bfloat16 compares with float32 there."""
    return {
        "system": platform.platform(),
        "processor": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "usable_cores": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": _bfloat16_instructions(),
        "bfloat16_time_ratio": _bfloat16_time_ratio(),
    }


def gpus() -> list[dict[str, Any]]:
    """Return name, capability and bytes of each GPU that torch sees; bytes are None where another
    process keeps the GPU to itself."""
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free: int | None = None
        with contextlib.suppress(RuntimeError):
            free, _ = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "free_bytes": free,
                "total_bytes": properties.total_memory,
            }
        )
    return devices


def memory() -> dict[str, int | None]:
    """Return bytes of main memory: total, available, and what the container allows (None: all)."""
    limit = _text("/sys/fs/cgroup/memory.max")
    return {
        "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available_bytes": _meminfo("MemAvailable"),
        "container_limit_bytes": int(limit) if limit and limit.isdigit() else None,
    }


def disk() -> dict[str, dict[str, Any]]:
    """Return free bytes where megaskip and its libraries write."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    folders = {
        "working_folder": Path.cwd(),
        "megaskip_cache": Path("~/.cache/megaskip").expanduser(),
        "hugging_face_cache": home,
        "shared_memory": Path("/dev/shm"),
    }
    sizes = {}
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        sizes[name] = {"path": str(folder), "free_bytes": shutil.disk_usage(existing).free}
    return sizes


def environment() -> dict[str, str]:
    """Return the variables that change what ranks, devices and caches do."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _VARIABLES or name.startswith(_PREFIXES)
    }


def _usable_cores() -> int:
    with contextlib.suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _bfloat16_instructions() -> str | None:
    """Return the processor's own bfloat16 instructions, None when it has none or does not say."""
    flags = (_line("/proc/cpuinfo", "flags") or _line("/proc/cpuinfo", "Features") or "").split()
    return next((flag for flag in _BFLOAT16_FLAGS if flag in flags), None)


def _bfloat16_time_ratio() -> float:
    """Return the time of a matrix product in bfloat16, as a multiple of that in float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(256, 512, dtype=dtype)
        right = torch.ones(512, 512, dtype=dtype)
        runs = []
        for _ in range(5):
            begun = time.perf_counter()
            left @ right
            runs.append(time.perf_counter() - begun)
        seconds[dtype] = min(runs)
    return round(seconds[torch.bfloat16] / seconds[torch.float32], 2)


def _meminfo(name: str) -> int | None:
    line = _line("/proc/meminfo", name)
    return int(line.split()[0]) * 1024 if line else None


def _line(path: str, name: str) -> str | None:
    """Return what a file of `name: value` lines says of the first `name`; None if it does not."""
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
