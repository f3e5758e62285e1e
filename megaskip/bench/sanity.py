"""Checks before speed: what skips computes what masks compute, and ZeRO-3 what one replica does."""

import copy
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaskip.arch import attach_routers, detach_routers
from megaskip.bench.parts import Case, Part
from megaskip.bench.setup import Row, Setup, Snapshots
from megaskip.bench.shapes import SHAPES, build, config_of
from megaskip.bench.training import make_batch
from megaskip.bench.variants import Bench, Variant, routed
from megaskip.config import ModelConfig, RouterConfig, RunConfig
from megaskip.config.routing import SUBLAYER_GRANULARITIES
from megaskip.inference.executor import InferenceExecutor
from megaskip.parallel.build import build_engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import Topology, process_group
from megaskip.routing import DenseExecutor
from megaskip.routing.executor import Executor

_ROWS, _TOKENS = 4, 64
_STEPS = 3
_SLACK = 2.0
"""Multiple of the masked logits' own rounding error, against float32, that skipping may have."""


@torch.no_grad()
def check_routing(part: Part, setup: Setup) -> Snapshots:
    """Yield whether bfloat16 logits with what is skipped left out are those with it masked."""
    torch.manual_seed(0)
    name = "llama3-1b" if setup.device.type == "cuda" else "tiny"
    shape = dataclasses.replace(SHAPES[name], layers=4)
    model = build(config_of(shape), setup.device, torch.bfloat16)
    ids = torch.randint(shape.vocabulary, (_ROWS, _TOKENS), device=setup.device)
    bench = Bench(model=model, layers=(1, 2), prompt=ids, answer=ids[:, :1])
    exact = dataclasses.replace(bench, model=copy.deepcopy(model).float())
    rows: list[Row] = []
    for granularity in SUBLAYER_GRANULARITIES:
        variant = routed(bench, granularity, "keep", 0.5)
        masked = _logits(bench, variant, DenseExecutor())
        skipped = _logits(bench, variant, InferenceExecutor(unit=granularity.split("_")[1]))
        truth = _logits(exact, variant, DenseExecutor())
        allowed, measured = (float((logits - truth).abs().max()) for logits in (masked, skipped))
        # Written so that NaN fails, too.
        row: Row = {"table": "sanity", "check": f"skipped = masked, {granularity}, bf16"}
        row |= {"passed": measured <= _SLACK * allowed, "unit": "largest error of a logit"}
        rows.append(row | {"measured": measured, "allowed": _SLACK * allowed})
        yield rows


def _logits(bench: Bench, variant: Variant, executor: Executor) -> Tensor:
    config = RouterConfig(granularity=variant.granularity, layers=bench.layers)
    routers = attach_routers(bench.model, config, verify=False)
    routers.executor = executor
    try:
        with routers.override(variant.prompt):
            output: Any = bench.model(input_ids=bench.prompt, use_cache=False)
    finally:
        detach_routers(bench.model)
    logits: Tensor = output.logits
    return logits.float()


def check_zero3(part: Part, setup: Setup) -> Snapshots:
    """Yield whether steps of router-tuning under ZeRO-3, on one rank, have the losses of a replica,
    bit for bit. Needs DeepSpeed, and is the last that a process does."""
    # DeepSpeed takes seconds to import; only this part pays for it.
    from megaskip.parallel.zero3 import prepare_deepspeed

    prepare_deepspeed()
    if sys.platform == "linux":  # one rank talks to itself: it needs no network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    config = RunConfig(model=ModelConfig(model="demo"))
    source = resolve_source(config.model)
    topology = Topology(rank=0, world_size=1, local_rank=0, device=setup.device)
    batch = make_batch(Case(name="", rows=2, real=128), source.text_config.vocab_size)

    def losses(ds_content: dict[str, Any] | None) -> list[float]:
        engine = build_engine(config, topology, source, ds_content)
        return [engine.train_step([batch], 1e-2).loss_task for _ in range(_STEPS)]

    with process_group(topology, timeout=600):
        yield [_same_losses(losses)]


def _same_losses(losses: Callable[[dict[str, Any] | None], list[float]]) -> Row:
    replica = losses(None)
    sharded = losses({"zero_optimization": {"stage": 3}})
    gap = max(abs(a - b) for a, b in zip(replica, sharded, strict=True))
    return {
        "table": "sanity",
        "check": f"losses of {_STEPS} steps: ZeRO-3 = replica",
        "passed": gap == 0,
        "measured": gap,
        "allowed": 0.0,
        "unit": "largest difference of a loss",
    }
