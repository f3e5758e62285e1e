"""DeepSpeed ZeRO-3 as the provider of frozen weights. Owns what DeepSpeed needs to know, not the
step.

Every decoder layer is a leaf that all ranks enter: what happens inside may differ by rank. The
routers stay outside of what is sharded; DeepSpeed sees a model without an optimizer.
"""

from collections.abc import Mapping
from typing import Any

import deepspeed
from torch import nn

from megaskip.arch import find_decoder
from megaskip.arch.task_loss import HeadLoss, TaskLoss


def prepare_deepspeed() -> None:
    """Switch off what DeepSpeed would build on a CPU: 27 s, and a lock that can hang for ever after
    a kill."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def shard(loss: TaskLoss, ds_config: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """Put ZeRO-3's hooks on a partitioned model; returns (module to call, handle of its hooks).
    Collective."""
    layer_types = {type(layer) for layer in find_decoder(loss.model).layers}
    deepspeed.utils.set_z3_leaf_modules(loss, [*layer_types, HeadLoss])
    engine, *_ = deepspeed.initialize(model=loss, config=dict(ds_config), dist_init_required=False)
    return engine.module, engine.optimizer
