"""From a checked RunConfig to an engine that can train: load, shard, attach, verify."""

import functools
from typing import Any

from torch import nn

from megaskip.arch import attach_routers, find_decoder, freeze
from megaskip.arch.adapters import add_adapters
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.compiled import compile_layers
from megaskip.arch.packing import choose_packed_attention, require_apart, takes_lengths
from megaskip.arch.padding import needs_mask
from megaskip.arch.stage import DecoderStage
from megaskip.arch.stage_proof import tiny_config, verify_stages
from megaskip.arch.task_loss import TaskLoss, verify_task_loss
from megaskip.config import RunConfig
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.log import get_logger
from megaskip.parallel.agree import on_every_rank
from megaskip.parallel.ds_config import require_dtype, zero3_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.full_engine import FullEngine
from megaskip.parallel.loading.partitioned import load_partitioned
from megaskip.parallel.loading.skeleton import build_tiny, skeleton
from megaskip.parallel.loading.source import ModelSource, choose_arithmetic
from megaskip.parallel.loading.stage_cuts import cuts_for_training
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.loading.weight_check import with_checked_weights
from megaskip.parallel.loading.whole import load_whole
from megaskip.parallel.sequence import SequenceGroup, require_sequence_parallel
from megaskip.parallel.topology import Topology
from megaskip.routing import RouterSet, SparseExecutor

logger = get_logger(__name__)


def build_full_engine(config: RunConfig, topology: Topology, source: ModelSource) -> FullEngine:
    """Return the engine that trains every weight (--train full), with the whole model on every
    rank. Collective.

    `source` is the resolved `config.model`. Raises MegaskipError when it cannot be loaded.
    """
    choose_arithmetic(source.dtype, topology.device)
    checked = with_checked_weights(source, topology)
    require_four_bit_fits(checked, config)
    model = on_every_rank(topology, lambda: load_whole(checked, topology.device)).eval()
    _prepare_packing(model, config)
    loss = TaskLoss(model, chunk_tokens=config.parallel.loss_chunk_tokens)
    verify_task_loss(loss)
    loss.needs_mask, loss.takes_lengths = _needs_mask(model), takes_lengths(model)
    model.train()
    if config.parallel.activation_checkpointing:
        checkpoint_activations(model, 0)
    return FullEngine(loss, config, topology)


def build_engine(
    config: RunConfig, topology: Topology, source: ModelSource, ds_content: dict[str, Any] | None
) -> Engine:
    """Return the engine that trains routers: of a pipeline's stage, under ZeRO-3 with `ds_content`,
    else with the whole model on every rank. Collective.

    `source` is the resolved `config.model`. Raises MegaskipError for models that cannot be loaded
    or routed.
    """
    choose_arithmetic(source.dtype, topology.device)
    source = with_checked_weights(source, topology)
    require_four_bit_fits(source, config)
    if ds_content is not None:
        require_dtype(ds_content, str(source.dtype).removeprefix("torch."))
    require_sequence_parallel(source, topology.sequence_size)
    if topology.num_stages > 1:
        return _pipeline(config, topology, source)
    if ds_content is None:
        model = on_every_rank(topology, lambda: load_whole(source, topology.device)).eval()
        loss, handle = TaskLoss(model, chunk_tokens=config.parallel.loss_chunk_tokens), None
    else:
        chunk_tokens = config.parallel.loss_chunk_tokens
        loss, handle = shard_backbone(source, ds_content, chunk_tokens)
    _prepare_packing(loss.model, config)
    verify_task_loss(loss)
    loss.needs_mask, loss.takes_lengths = _needs_mask(loss.model), takes_lengths(loss.model)
    group = _share_tokens(loss, config, topology)
    if handle is not None:
        from megaskip.parallel.zero3 import forget_order

        forget_order(handle)
    routers = attach_routers(loss.model, config.router, register=False)
    add_adapters(loss.model, routers, skeleton(source), config, device=topology.device)
    choose_executor(routers, config)
    if config.parallel.activation_checkpointing:
        checkpoint_activations(loss.model, routers.lowest_learning_layer)
    if config.parallel.compile:
        logger.info("%s", compile_layers(loss.model, routers))
    return Engine(loss, routers, config, topology, handle, group)


def require_four_bit_fits(source: ModelSource, config: RunConfig) -> None:
    """Raise ConfigError when a base that lies in 4 bit in its folder does not go with `config`;
    what --base_dtype nf4 does not go with, the config knows by itself."""
    base = source.packed_name
    problems = list(config.four_bit_problems(base)) if base else []
    if problems:
        raise ConfigError(*problems)


def _pipeline(config: RunConfig, topology: Topology, source: ModelSource) -> Engine:
    """Return the engine of one stage, once a tiny copy of the family has been cut and compared."""
    # Only runs with stages pay for the import of DeepSpeed, which has the schedules.
    from megaskip.parallel.pipeline import PipelineEngine

    masked = verify_stages(source.hf_config, functools.partial(build_tiny, source))
    _log_mask(masked)
    if config.data.packing and "flash" not in config.model.attn_implementation:
        require_apart(build_tiny(source, tiny_config(source.hf_config)).float().eval())
    whole = skeleton(source)
    cuts = cuts_for_training(whole, config)
    layers = cuts[topology.stage]
    chunk_tokens = config.parallel.loss_chunk_tokens

    def take_apart(model: nn.Module) -> DecoderStage:
        return DecoderStage(model, layers, chunk_tokens=chunk_tokens)

    device = topology.device
    stage = on_every_rank(topology, lambda: load_stage(source, layers, take_apart, device))
    stage.needs_mask, stage.takes_lengths = masked, takes_lengths(stage.decoder)
    routers = attach_routers(stage, config.router, register=False)
    add_adapters(stage, routers, whole, config, device=device)
    choose_executor(routers, config)
    if config.parallel.activation_checkpointing:
        checkpoint_activations(stage.decoder, routers.lowest_learning_layer)
    return PipelineEngine(stage, routers, config, topology)


def _prepare_packing(model: nn.Module, config: RunConfig) -> None:
    """Choose the attention of packed rows, unless --attn_implementation does, and prove it. Under
    ZeRO-3 collective."""
    if not config.data.packing:
        return
    # What is told of all rows of a batch (lengths, flex attention's mask) cannot serve some.
    if config.model.attn_implementation != "auto" or config.leaves_out_skipped:
        require_apart(model)
    else:
        choose_packed_attention(model)


def _share_tokens(loss: TaskLoss, config: RunConfig, topology: Topology) -> SequenceGroup | None:
    """Let ranks share the tokens of rows where --sequence_parallel_size asks for it, and prove it.
    Collective."""
    if topology.sequence_size == 1:
        return None
    # Only such runs pay for the import of DeepSpeed, which has the exchange.
    from megaskip.parallel.ulysses import share_attention

    if loss.needs_mask:
        raise UnsupportedModelError(
            f"{loss.model.config.model_type}: padding changes real tokens of this family, so it is "  # type: ignore[union-attr]
            "masked, and ranks that share the tokens of a row have no mask; leave "
            "--sequence_parallel_size out"
        )
    group = SequenceGroup(topology, timeout=config.parallel.dist_timeout)
    share_attention(loss, group)
    return group


def _needs_mask(model: nn.Module) -> bool:
    """Return whether padding is masked, and say so where it is. Under ZeRO-3 collective."""
    needed = needs_mask(find_decoder(model).decoder)
    _log_mask(needed)
    return needed


def _log_mask(needed: bool) -> None:
    if needed:
        logger.info("in this model padding changes real tokens, so it is masked; that costs time")


def choose_executor(routers: RouterSet, config: RunConfig) -> None:
    """Let training leave out what is skipped where it is asked for, or where it has nothing to
    teach."""
    if config.leaves_out_skipped:
        shared = config.parallel.sequence_parallel_size > 1
        routers.executor = SparseExecutor(rows_are_shared=shared)


def shard_backbone(
    source: ModelSource, ds_content: dict[str, Any], chunk_tokens: int
) -> tuple[TaskLoss, Any]:
    """Return (the frozen backbone in its task loss, handle of ZeRO-3's hooks), partitioned over
    the ranks. Collective."""
    # DeepSpeed reads its environment on import, and takes seconds; only runs that shard pay for it.
    from megaskip.parallel.zero3 import shard

    shape = skeleton(source)
    layer_numel = sum(p.numel() for p in find_decoder(shape).layers[-1].parameters())
    largest = max(p.numel() for p in shape.parameters())
    ds_config = zero3_config(ds_content, layer_numel=layer_numel, largest_numel=largest)
    # Ranks wait for each other in there: one that fails ends alone, and its message is read.
    model = load_partitioned(source, ds_config).eval()
    freeze(model)
    return shard(TaskLoss(model, chunk_tokens=chunk_tokens), ds_config)
