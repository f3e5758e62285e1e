"""What one call makes the host and the device do: operators, kernel launches, waits, busy time.

On a CPU there are neither launches nor waits for a device: operators are counted, and the waits
that the same calls would be on a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Beginnings of the runtime's names of what the host gives to the device, graphs aside."""
GRAPHS = "cudaGraphLaunch"
RUNTIME = ("cuda", "cuLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
"""cudaDeviceSynchronize is left out: the profiler ends with it, and so do our clocks."""
CPU_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")
"""Operators for whose results the host waits on a GPU."""
_OPTIMIZER = "Optimizer.step#"


def count_calls(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return {"operators", "launches", "waits", "busy_ms"} of one call; on a CPU without launches
    and busy time, and on a GPU without what the profiler is kept from seeing."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities) as profiled:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    # Not profiled.key_averages(): it builds a tree of all calls, which takes seconds for a step.
    events: Any = profiled.profiler.kineto_results.events()
    counts = Counter(event.name() for event in _without_optimizer_reads(events))
    counted = from_names(counts, is_cuda=device.type == "cuda")
    if "launches" in counted:
        counted["busy_ms"] = sum(e.duration_ns() for e in events if _is_work(e)) / 1e6
    return counted


def from_names(counts: Mapping[str, int], *, is_cuda: bool) -> dict[str, float]:
    """Return the sums of a profile's counts by name."""
    operators = sum(count for name, count in counts.items() if name.startswith("aten::"))
    if not is_cuda:
        waits = sum(counts.get(name, 0) for name in CPU_WAITS)
        return {"operators": operators, "waits": waits}
    if not any(name.startswith(RUNTIME) for name in counts):
        return {"operators": operators}  # the profiler may not look at the runtime here
    launches = sum(n for name, n in counts.items() if name.startswith((*LAUNCHES, GRAPHS)))
    waits = sum(n for name, n in counts.items() if name.startswith(WAITS))
    return {"operators": operators, "launches": launches, "waits": waits}


def _without_optimizer_reads(events: Iterable[Any]) -> Iterator[Any]:
    """Yield events but the optimizer's reads of its step counters, which are on the CPU always."""
    events = list(events)
    steps = [(e.start_ns(), e.end_ns()) for e in events if e.name().startswith(_OPTIMIZER)]
    for event in events:
        inside = any(start <= event.start_ns() <= end for start, end in steps)
        if not (inside and event.name() == CPU_WAITS[0]):
            yield event


def _is_work(event: Any) -> bool:
    """Return whether an event is a kernel or a copy on the device, not a name put over some."""
    on_device = event.device_type() == torch.autograd.DeviceType.CUDA
    return on_device and not event.is_user_annotation()
