"""A model partitioned by ZeRO-3: each rank reads its own slice of every tensor."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from megaskip.config.four_bit import four_bit_problems
from megaskip.errors import CheckpointError, ConfigError
from megaskip.log import get_logger
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.parallel.loading.joined_values import holds_row, joined_rows, not_joined
from megaskip.parallel.loading.loaded_values import require_same
from megaskip.parallel.loading.skeleton import build_model, skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stored_values import read_stored
from megaskip.parallel.loading.weight_check import plan_of
from megaskip.parallel.loading.weight_plan import WeightPlan
from megaskip.parallel.loading.whole import load_whole

logger = get_logger(__name__)


def load_partitioned(source: ModelSource, ds_config: Mapping[str, Any]) -> nn.Module:
    """Return the model with its weights partitioned by ZeRO-3; no rank ever holds it whole.
    Collective.

    Each rank maps the safetensors shards and copies its own slice of every tensor: no
    communication, and a rank reads 1/W of the bytes. Models whose stored tensors transformers joins
    or splits on loading (experts), or that store buffers, go through from_pretrained, where rank 0
    reads and scatters. Raises CheckpointError as `check_weights` does, and on every rank when the
    weights in memory of one are not those of the files, ConfigError for those that are packed in
    4 bit; a rank that cannot read the files raises MegaskipError alone.
    """
    import deepspeed

    plan = plan_of(source)
    if base := source.packed_name:
        raise ConfigError(
            *four_bit_problems(base, train="routers", ds_config="JSON", pipeline_stages=1)
        )
    offload = ds_config["zero_optimization"].get("offload_param", {}).get("device")
    why = _why_scattered(skeleton(source), plan)
    if offload == "nvme" or why:
        why = why or "NVMe offload"
        logger.info("weights are read by rank 0 and scattered (%s)", why)
        model = _load_by_transformers(source, ds_config)
        _require_loaded(source, plan, model)
        return model
    with (
        no_init_weights(),
        _exact_arange(),
        deepspeed.zero.Init(config_dict_or_path=_with_dtype(ds_config, source.dtype)),
    ):
        model = build_model(source, source.dtype)
    # Construction without initialisation leaves tied embeddings apart.
    model.tie_weights()  # type: ignore[operator]
    _fill_partitions(model, source, plan)
    _require_loaded(source, plan, model)
    return model


@torch.no_grad()
def _fill_partitions(model: nn.Module, source: ModelSource, plan: WeightPlan) -> None:
    """Copy this rank's slice of every parameter from the mapped shards into its partition."""
    parameters = dict(model.named_parameters())
    wanted = {name: plan.stored[name] for name in parameters}
    for name, stored in read_stored(source.folder, wanted):
        _fill(parameters[name], stored)


def _fill(parameter: Any, stored: Tensor) -> None:
    """Copy this rank's slice of a stored tensor into its partition of a parameter."""
    rank = parameter.ds_process_group.rank()
    _copy_slice(parameter.ds_tensor, stored, rank)
    if parameter.ds_secondary_tensor is not None:
        # hpZ gathers from this second copy, which is sharded over a node's ranks.
        rank %= parameter.ds_secondary_tensor_group_size
        _copy_slice(parameter.ds_secondary_tensor, stored, rank)


def _copy_slice(partition: Any, stored: Tensor, rank: int) -> None:
    """Copy the part of `stored` that belongs to the partition of `rank`; the rest is padding."""
    start = partition.ds_numel * rank
    mine = stored.view(-1)[start : start + partition.ds_numel]
    partition.data[: mine.numel()].copy_(mine)


def _require_loaded(source: ModelSource, plan: WeightPlan, model: nn.Module) -> None:
    """Raise CheckpointError, on every rank, unless the partitions of all hold what the files have
    in their place, and joined weights some rows of the files on one rank or another. Collective."""
    folder = source.folder
    problem: CheckpointError | None = None
    looked_for: list[CheckpointError] = []
    seen: list[bool] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        mine, first = _mine(tensor)
        if mine is not None and name in plan.stored:
            try:
                require_same(folder, name, plan.stored[name], mine, first=first)
            except CheckpointError as error:
                problem = problem or error
        rows = list(joined_rows(plan, name))
        if rows:
            looked_for.append(not_joined(folder, name, rows[0][0]))
            # What is swapped to a disk is not looked at; a row may begin across a border of ranks.
            seen.append(
                mine is None
                or any(holds_row(folder, mine, stored, row, first=first) for stored, row in rows)
            )
    everywhere = gather_from_ranks((problem, seen))
    by_weight = zip(*(seen for _, seen in everywhere), strict=True)
    missing = [e for e, held in zip(looked_for, by_weight, strict=True) if not any(held)]
    problems = [problem for problem, _ in everywhere if problem is not None]
    if problems or missing:
        raise [*problems, *missing][0]


def _mine(tensor: Any) -> tuple[Tensor | None, int]:
    """Return (what this rank holds of a weight, number of its first element); None for what is not
    in memory."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    partition = getattr(tensor, "ds_tensor", None)
    if partition is None or tensor.ds_status == ZeroParamStatus.AVAILABLE:
        return tensor, 0
    if partition.numel() != partition.ds_numel:
        return None, 0
    first = partition.ds_numel * tensor.ds_process_group.rank()
    return partition[: max(tensor.ds_numel - first, 0)], first


def _load_by_transformers(source: ModelSource, ds_config: Mapping[str, Any]) -> nn.Module:
    from transformers.integrations import HfDeepSpeedConfig

    # It must live while the model loads.
    live = HfDeepSpeedConfig(_with_dtype(ds_config, source.dtype))
    with _exact_arange():
        model = load_whole(source, None)  # DeepSpeed puts the partitions where they belong
    del live
    return model


@contextlib.contextmanager
def _exact_arange() -> Iterator[None]:
    """Let torch.arange keep its own type in zero.Init, which is entered inside.

    zero.Init gives it the weights' type, which would round RoPE's frequencies to bfloat16.
    transformers has a remedy of its own, prevent_arange_dtype_change, but not in 5.17, whose models
    need it already.
    """
    from deepspeed.runtime.zero import partition_parameters

    wrap = partition_parameters.zero_wrapper_for_fp_tensor_constructor

    def keep_arange(
        make: Callable[..., Tensor], target_fp_dtype: torch.dtype | None, target_device: Any
    ) -> Callable[..., Tensor]:
        is_arange = make is partition_parameters._orig_torch_arange
        return wrap(make, None if is_arange else target_fp_dtype, target_device)

    partition_parameters.zero_wrapper_for_fp_tensor_constructor = keep_arange
    try:
        yield
    finally:
        partition_parameters.zero_wrapper_for_fp_tensor_constructor = wrap


def _with_dtype(ds_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the JSON that makes partitions of type `dtype`.

    zero.Init's own argument is not used: on a CPU, DeepSpeed 0.19.8 takes any given dtype for
    bfloat16.
    """
    return {**ds_config, "bf16": {"enabled": dtype == torch.bfloat16}}


def _why_scattered(model: nn.Module, plan: WeightPlan) -> str | None:
    """Return why ranks cannot fill their partitions of `model` from the shards, None if they
    can."""
    parameters = {name for name, _ in model.named_parameters()}
    if not parameters <= plan.stored.keys():
        return "stored tensors are joined or split on loading"
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return "the model stores buffers, too" if buffers else None
