"""DeepSpeed ZeRO-3 as the provider of frozen weights. Owns what DeepSpeed needs to know, not the
step.

Every decoder layer is a leaf that all ranks enter: what happens inside may differ by rank. The
routers stay outside of what is sharded; DeepSpeed sees a model without an optimizer.
"""

import ctypes
import ctypes.util
from collections.abc import Mapping
from typing import Any

from megaskip.arch import find_decoder
from megaskip.arch.task_loss import HeadLoss, TaskLoss
from megaskip.extras import extra
from megaskip.parallel.saved_weights import save_no_weights

with extra("train"):
    import deepspeed

_MMAP_THRESHOLD = 4 << 20
"""Bytes from which a freed block goes back to the system at once."""
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


def prepare_deepspeed() -> None:
    """Set the process up for ZeRO-3; before the first weight is made."""
    # On a CPU DeepSpeed would build it: 27 s, and a lock that can hang for ever after a kill.
    # Nothing else is looked up there; asking for the attribute would try out every operation.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    _return_memory()


def _return_memory() -> None:
    """Let freed gathers leave a CPU rank's memory.

    glibc raises its threshold to 32 MiB by itself and keeps freed layers as holes between the
    partitions: measured, a rank that holds 0.6 GiB grew to 2.5 GiB.
    """
    libc = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(libc), "mallopt", None) if libc else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def shard(loss: TaskLoss, ds_config: Mapping[str, Any]) -> tuple[TaskLoss, Any]:
    """Put ZeRO-3's hooks on a partitioned model; returns (module to call, handle of its hooks).
    Collective."""
    layers = find_decoder(loss.model).layers
    layer_types = {type(layer) for layer in layers}
    deepspeed.utils.set_z3_leaf_modules(loss, [*layer_types, HeadLoss])
    engine, *_ = deepspeed.initialize(model=loss, config=dict(ds_config), dist_init_required=False)
    save_no_weights(layers)  # behind DeepSpeed's own hooks, which gather
    return engine.module, engine.optimizer


def forget_order(handle: Any) -> None:
    """Let DeepSpeed learn anew in which order modules run: `handle` is that of its hooks.

    It would take passes that try out parts of the model for the beginning of a step. What it then
    decides not to release, such as an embedding that seems to come back, it decides once and for
    all (an lru_cache in its partitioned_param_coordinator.py): a 70B rank held 2 GiB more.
    """
    coordinator = handle.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
