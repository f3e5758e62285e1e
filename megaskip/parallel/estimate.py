"""What a run will need, without weights and without ranks: a micro-step on fake tensors of the true
shape.

DeepSpeed's own estimator charges 18 bytes for every parameter, as if a frozen model had an
optimizer.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megaskip.arch import attach_routers, find_decoder
from megaskip.arch.adapters import add_adapters
from megaskip.arch.checkpointing import checkpoint_activations
from megaskip.arch.task_loss import TaskLoss
from megaskip.config import RunConfig
from megaskip.parallel.ds_config import zero3_config
from megaskip.parallel.estimate_sequence import plan_attention, plan_without_mask
from megaskip.parallel.live_bytes import LiveBytes, fake_tensors
from megaskip.parallel.loading.quantised import planned
from megaskip.parallel.loading.skeleton import build_uninitialised, quantised_skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.shared_moments import moment_numel

WEIGHT_AND_GRADIENT = MOMENTS = 8
"""Bytes of a trained parameter: float32 weight and gradient, and AdamW's two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes on one rank by kind, and what trains."""

    weights: int
    """The backbone: this rank's partition, and what is kept whole on every rank."""
    gathers: int
    """Parameters of other ranks that ZeRO-3 holds at once."""
    trained: int
    """Trained weights, gradients and optimizer moments."""
    activations: int
    """Kept from the forward for the backward pass."""
    workspace: int
    """Logits of a chunk and other temporaries, at the worst moment."""
    parameters: int
    trainable: tuple[tuple[str, tuple[int, ...]], ...]
    moments: int
    """Of `trained`, what the optimizer's two moments take."""

    @property
    def total(self) -> int:
        """Return the bytes of a rank at the worst moment, without what libraries take for
        themselves: allocator, CUDA context, NCCL buffers."""
        return self.weights + self.gathers + self.trained + self.activations + self.workspace


def estimate(
    config: RunConfig,
    source: ModelSource,
    *,
    world_size: int,
    ds_content: dict[str, Any] | None,
) -> Estimate:
    """Return what each rank of `world_size` will need. Touches no weights and no process group."""
    with fake_tensors():
        model = build_uninitialised(source, source.dtype)
        model.train(config.model.train == "full")
        parameters = [(p.numel(), p.element_size()) for p in model.parameters()]
        sizes_to_gather = _sizes_to_gather(model)
        trainable, activations, workspace = _micro_step(model, config)
    weights, gathers = sum(n * s for n, s in parameters), 0
    if ds_content is not None:
        weights, gathers = _zero3_bytes(parameters, sizes_to_gather, world_size, ds_content)
    if source.four_bit is not None:
        weights, largest = planned(quantised_skeleton(source))
        workspace += largest * source.dtype.itemsize
    sizes = {name: torch.Size(shape).numel() for name, shape in trainable}
    full = config.model.train == "full"
    moments = MOMENTS * moment_numel(sizes, world_size)
    # Weights that train are counted with the backbone where they are the backbone.
    others = (WEIGHT_AND_GRADIENT - 4 * full) * sum(sizes.values())
    return Estimate(
        weights=weights,
        gathers=gathers,
        trained=others + moments,
        activations=activations,
        workspace=workspace,
        parameters=sum(n for n, _ in parameters),
        trainable=tuple(trainable),
        moments=moments,
    )


def _micro_step(
    model: Any, config: RunConfig
) -> tuple[list[tuple[str, tuple[int, ...]]], int, int]:
    """Return (what trains, bytes kept for the backward pass, further bytes at the worst moment)."""
    size = config.parallel.sequence_parallel_size
    batch, tokens = config.optim.micro_batch_size, -(-config.data.seq_length // size)
    if size > 1:
        plan_attention(model, size)
    elif not config.data.packing:
        plan_without_mask(model)
    loss = TaskLoss(model, chunk_tokens=config.parallel.loss_chunk_tokens)
    routers = None
    if config.model.train == "routers":
        routers = attach_routers(model, config.router, register=False, verify=False)
        add_adapters(model, routers, model, config)
    trains = routers if routers is not None else model
    learn = dict(model.named_parameters()) if routers is None else routers.trained_parameters()
    trainable = [(n, tuple(p.shape)) for n, p in learn.items() if p.requires_grad]
    if config.parallel.activation_checkpointing:
        checkpoint_activations(model, routers.lowest_learning_layer if routers is not None else 0)
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    real = torch.ones(batch, tokens, dtype=torch.bool)
    with LiveBytes() as live:
        live.ignore([*model.parameters(), *model.buffers(), *trains.parameters()])
        live.ignore(learn.values())
        if routers is not None:
            routers.set_batch(real, real)
        # Of packed rows transformers makes its 4-D mask here, and repeats grouped keys for it.
        hidden = find_decoder(model).decoder(input_ids=ids, use_cache=False)[0]
        activations = live.current
        task = loss.head(hidden.flatten(0, 1), ids.flatten())
        total = task if routers is None else task + routers.penalty()
        del hidden
        total.backward()
        gradients = sum(p.numel() * p.element_size() for p in learn.values() if p.requires_grad)
        return trainable, activations, max(live.peak - activations - gradients, 0)


class _Sizes(NamedTuple):
    """How many numbers the weights hold that ZeRO-3 gathers."""

    layer: int
    """Of the last layer."""
    largest_in_layer: int
    largest_outside: int
    """The embedding's or the head's."""


def _sizes_to_gather(model: Any) -> _Sizes:
    layers = find_decoder(model).layers
    inside = {id(parameter) for parameter in layers.parameters()}
    sizes = [parameter.numel() for parameter in layers[-1].parameters()]
    outside = max(p.numel() for p in model.parameters() if id(p) not in inside)
    return _Sizes(layer=sum(sizes), largest_in_layer=max(sizes), largest_outside=outside)


def _zero3_bytes(
    parameters: list[tuple[int, int]], sizes: _Sizes, world_size: int, content: dict[str, Any]
) -> tuple[int, int]:
    """Return (bytes kept on a rank, bytes of gathered parameters at the worst moment)."""
    largest = max(n for n, _ in parameters)
    zero = zero3_config(content, layer_numel=sizes.layer, largest_numel=largest)[
        "zero_optimization"
    ]
    threshold = zero["stage3_param_persistence_threshold"]
    offloaded = zero.get("offload_param", {}).get("device", "none") != "none"
    if world_size == 1 and not offloaded:
        return sum(n * s for n, s in parameters), 0  # DeepSpeed computes in the only partition
    partitions = sum(-(-n // world_size) * s for n, s in parameters)
    persistent = sum(n * s for n, s in parameters if n <= threshold)
    element = parameters[0][1]
    secondary = zero.get("zero_hpz_partition_size", 1)
    shared = sum(-(-n // secondary) * s for n, s in parameters) if secondary > 1 else 0
    kept = persistent + (0 if offloaded else partitions) + shared
    return kept, _gathered(sizes, zero) * element


def _gathered(sizes: _Sizes, zero: dict[str, Any]) -> int:
    """Return how many numbers of gathered weights a rank holds at the worst moment.

    DeepSpeed fetches ahead into a buffer, which stays until all of its weights were used, beside
    the weights that are copied out of it; the last weight of a buffer may exceed its size. The
    embedding or the head is in such a buffer, too, or is fetched by itself if it is larger.
    """
    room = zero["stage3_max_live_parameters"] - sizes.layer
    ahead = max(int(min(zero["stage3_prefetch_bucket_size"], room)), 0)
    in_layers = sizes.layer + 2 * ahead + (sizes.largest_in_layer if ahead else 0)
    if sizes.largest_outside <= ahead:
        return in_layers + sizes.largest_outside
    return max(in_layers, sizes.largest_outside + sizes.layer + ahead)
