"""The job of `megaskip doctor`: examine, and print a table or JSON."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from megaskip.config.commands.doctor import DoctorOptions
from megaskip.doctor.collectives import backends, measure_collectives
from megaskip.doctor.machine import (
    LIBRARIES,
    disk,
    environment,
    gpus,
    memory,
    processor,
    software,
)
from megaskip.errors import RankError
from megaskip.log import quiet_libraries
from megaskip.parallel.topology import read_topology
from megaskip.reporting.summary import human_bytes, table

_SLOW_BFLOAT16 = 1.5
"""Multiple of float32's time above which bfloat16 is worth a word."""
_SMALL_SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm under which NCCL and DataLoader workers may run out: containers give 64 MiB."""


def examine(options: DoctorOptions) -> None:
    """Print what this machine has. Collective: all ranks of a launcher call it, the first prints.

    Raises RankError, after the report, when the ranks cannot talk to each other.
    """
    quiet_libraries()
    topology = read_topology(os.environ)
    report = examination()
    failure: RankError | None = None
    try:
        report["collectives"] |= measure_collectives(topology)
    except RankError as error:
        failure = error
        report["collectives"]["failure"] = str(error)
    if topology.is_first:
        text = json.dumps(report, indent=2) if options.json else "\n".join(report_lines(report))
        print(text, flush=True)
    if failure is not None:
        raise failure


def examination() -> dict[str, Any]:
    """Return what this process alone can find out, as JSON has it."""
    report: dict[str, Any] = {
        "software": software(),
        "processor": processor(),
        "gpus": gpus(),
        "memory": memory(),
        "disk": disk(),
        "environment": environment(),
        "collectives": backends(),
    }
    report["notes"] = list(_notes(report))
    return report


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the report as a table."""
    processor, memory = report["processor"], report["memory"]
    gpus = [
        (f"gpu {index}", f"{gpu['name']}, {gpu['compute_capability']}, {_free(gpu)}")
        for index, gpu in enumerate(report["gpus"])
    ]
    limit = memory["container_limit_bytes"]
    allowed = f", container limit {human_bytes(limit)}" if limit is not None else ""
    available = human_bytes(memory["available_bytes"] or 0)
    rows = [
        *((name, number) for name, number in report["software"].items()),
        ("system", processor["system"]),
        ("processor", f"{processor['processor']}, {processor['instructions']}"),
        ("cores", f"{processor['usable_cores']} usable, {processor['torch_threads']} in torch"),
        (
            "bfloat16 on the CPU",
            f"{processor['bfloat16_time_ratio']:.1f} x the time of float32, instructions: "
            f"{processor['bfloat16_instructions'] or 'none'}",
        ),
        *(gpus or [("gpu", "none")]),
        ("memory", f"{available} available of {human_bytes(memory['total_bytes'])}{allowed}"),
        *(
            (name.replace("_", " "), f"{human_bytes(size['free_bytes'])} free, {size['path']}")
            for name, size in report["disk"].items()
        ),
        ("environment", "  ".join(f"{k}={v}" for k, v in report["environment"].items())),
        *_collective_rows(report["collectives"]),
        *(("note", note) for note in report["notes"]),
    ]
    return table(rows, title="megaskip doctor")


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a user may want to change, and how."""
    missing: dict[str, list[str]] = {}
    for library, extra in LIBRARIES.items():
        if extra is not None and report["software"][library] == "not installed":
            missing.setdefault(extra, []).append(library)
    for extra, libraries in missing.items():
        yield f"{', '.join(libraries)} not installed: pip install megaskip[{extra}]"
    if not report["gpus"] and report["processor"]["bfloat16_time_ratio"] > _SLOW_BFLOAT16:
        yield "bfloat16 is slow on this CPU: use --dtype float32"
    shared = report["disk"]["shared_memory"]["free_bytes"]
    if report["gpus"] and shared < _SMALL_SHARED_MEMORY:
        yield (
            f"/dev/shm has {human_bytes(shared)} free, which may be too little for NCCL: start "
            "the container with --shm-size 8g or --ipc host"
        )


def _free(gpu: Mapping[str, Any]) -> str:
    free = "unknown" if gpu["free_bytes"] is None else human_bytes(gpu["free_bytes"])
    return f"{free} free of {human_bytes(gpu['total_bytes'])}"


def _collective_rows(collectives: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    words = {True: "yes", False: "no"}
    libraries = ((name, collectives[name]) for name in ("gloo", "nccl", "mpi", "cuda"))
    text = "  ".join(f"{name}: {words.get(value, value)}" for name, value in libraries)
    yield "collectives", text
    if "failure" in collectives:
        yield "ranks", f"cannot talk to each other: {collectives['failure']}"
        return
    yield "ranks", f"{collectives['ranks']} on {', '.join(collectives['nodes'])}"
    for backend, seconds in collectives["all_reduce_seconds"].items():
        yield f"all-reduce, {backend}", f"{1000 * seconds:.2f} ms for 4 MiB"
