"""What each stage of a pipeline will need: one micro-step of it on fake tensors, and those in
flight."""

import torch
from torch import Tensor

from megaskip.arch import attach_routers
from megaskip.arch.adapters import add_adapters
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.stage import DecoderStage, LayerRange
from megaskip.config import RunConfig
from megaskip.parallel.estimate import MOMENTS, WEIGHT_AND_GRADIENT, Estimate
from megaskip.parallel.estimate_sequence import plan_without_mask
from megaskip.parallel.live_bytes import LiveBytes, fake_tensors
from megaskip.parallel.loading.quantised import planned
from megaskip.parallel.loading.skeleton import build_uninitialised, quantised_skeleton, skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stage_cuts import cuts_for_training
from megaskip.parallel.shared_moments import moment_numel
from megaskip.routing import RouterSet
from megaskip.routing.handover import carried_keep, receive_keep


def estimate_stages(
    config: RunConfig, source: ModelSource, world_size: int | None = None
) -> list[Estimate]:
    """Return what a rank of each stage will need, first stage first, where `world_size` ranks run
    (without it one replica). Touches no weights."""
    shape = skeleton(source)
    cuts = cuts_for_training(shape, config)
    parameters = sum(p.numel() for p in shape.parameters())
    estimates = []
    for number, layers in enumerate(cuts):
        # 1F1B: these micro-batches have gone forward here and wait for their backward pass.
        in_flight = min(len(cuts) - number, config.optim.gradient_accumulation_steps)
        with fake_tensors():
            model = build_uninitialised(source, source.dtype)
            if not config.data.packing:
                plan_without_mask(model)
            chunk = config.parallel.loss_chunk_tokens
            stage = DecoderStage(model, layers, chunk_tokens=chunk).eval()
            routers = attach_routers(stage, config.router, register=False, verify=False)
            add_adapters(stage, routers, shape, config)
            activations, workspace = _micro_step(stage, routers, config, source.dtype)
        weights = sum(p.numel() * p.element_size() for p in stage.parameters())
        if source.four_bit is not None:
            packed = DecoderStage(quantised_skeleton(source), layers, chunk_tokens=chunk)
            weights, largest = planned(packed)
            workspace += largest * source.dtype.itemsize
        trained = routers.trained_parameters()
        trainable = [(name, tuple(p.shape)) for name, p in trained.items()]
        sizes = {name: p.numel() for name, p in trained.items()}
        moments = MOMENTS * moment_numel(sizes, world_size or len(cuts))
        estimates.append(
            Estimate(
                weights=weights,
                gathers=0,
                trained=WEIGHT_AND_GRADIENT * sum(sizes.values()) + moments,
                activations=in_flight * activations,
                workspace=workspace,
                parameters=parameters,
                trainable=tuple(trainable),
                moments=moments,
            )
        )
    return estimates


def _micro_step(
    stage: DecoderStage, routers: RouterSet, config: RunConfig, dtype: torch.dtype
) -> tuple[int, int]:
    """Return (bytes kept for the backward pass, further bytes at the worst moment)."""
    if config.parallel.activation_checkpointing:
        checkpoint_activations(stage.decoder, routers.lowest_learning_layer)
    shape = (config.optim.micro_batch_size, config.data.seq_length)
    real = torch.ones(shape, dtype=torch.bool)
    positions = torch.arange(shape[1]).expand(shape)
    below = sum(layer < stage.layer_range.first for layer in routers.layers)
    with LiveBytes() as live:
        learn = routers.trained_parameters()
        live.ignore([*stage.parameters(), *stage.buffers(), *routers.parameters()])
        live.ignore(learn.values())
        routers.set_batch(real, real)
        learns = routers.lowest_learning_layer < stage.layer_range.first
        inputs = _inputs(stage.layer_range, (*shape, stage.hidden_size), dtype, learns=learns)
        if below:
            units = routers.pooling(real, real).unit_mask.shape
            receive_keep(routers, torch.ones(below, *units, requires_grad=True))
        left = [stage(inputs, None, positions)]
        activations = live.current
        if stage.head is not None:
            ids = torch.zeros(shape, dtype=torch.int64)
            left = [stage.head(left[0].flatten(0, 1), ids.flatten()), routers.penalty()]
        keep = carried_keep(routers)
        left += [keep] if keep is not None and stage.head is None else []
        if keep is not None:
            torch.autograd.backward(left, [torch.ones_like(output) for output in left])
        return activations, max(live.peak - activations, 0)


def _inputs(
    layers: LayerRange, shape: tuple[int, ...], dtype: torch.dtype, *, learns: bool
) -> Tensor:
    if layers.is_first:
        return torch.zeros(shape[:-1], dtype=torch.int64)
    return torch.zeros(shape, dtype=dtype, requires_grad=learns)
