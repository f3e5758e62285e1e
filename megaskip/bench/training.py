"""Training steps: router-tuning, LoRA and full fine-tuning, one model at a time, by the engines of
`megaskip train`."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaskip import data
from megaskip.arch import attach_routers, find_decoder
from megaskip.arch.packing import attention_of, choose_packed_attention, takes_lengths
from megaskip.arch.padding import needs_mask
from megaskip.arch.task_loss import TaskLoss
from megaskip.bench.attempts import OUT_OF_MEMORY, Attempts
from megaskip.bench.costs import LORA_RANK, extrapolated_seconds, layer_seconds, training_flops
from megaskip.bench.counters import count_calls
from megaskip.bench.memory import free, peak_of
from megaskip.bench.parts import Case, Part
from megaskip.bench.setup import Row, Setup, Snapshots
from megaskip.bench.shapes import SHAPES, Shape, build, config_of
from megaskip.bench.timing import Sample, median_error, of_base, speedup, timed_pairs
from megaskip.config import RouterConfig, RunConfig
from megaskip.extras import extra
from megaskip.parallel.engine import Engine
from megaskip.parallel.full_engine import FullEngine
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.topology import Topology

_CHUNK_TOKENS = 1024
_RATE = 1e-6
"""Learning rate: weights are random, and shall stay what they are."""
_WARMUP = 2


def measure_training(part: Part, setup: Setup) -> Snapshots:
    """Yield the rows of one method on one shape; of a stack of layers, on two depths."""
    shape = SHAPES[part.shape]
    depths = (part.layers, part.layers // 2) if part.layers else (shape.layers,)
    finished: list[Row] = []
    rows: list[Row] = []
    for index, depth in enumerate(depths):
        share = 1 / (len(depths) - index)
        cut = dataclasses.replace(shape, layers=depth)
        for rows in _measure_depth(part, cut, setup, share):
            yield finished + rows
        finished += rows
        free()
    if len(depths) == 2:
        yield finished + _extrapolated(part, shape, finished)


def make_engine(method: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> StepEngine:
    """Return the engine of a method on a fresh model with random weights, made on the device.

    Raises MissingExtraError for LoRA without peft.
    """
    topology = Topology(rank=0, world_size=1, local_rank=0, device=device)
    model = build(config_of(shape), device, dtype)
    masked = needs_mask(find_decoder(model).decoder)
    model = with_adapters(model) if method == "lora" else model
    loss = TaskLoss(model, chunk_tokens=_CHUNK_TOKENS)
    loss.needs_mask = masked
    if method == "routers":
        routers = attach_routers(model, RouterConfig(), register=False, verify=False)
        return Engine(loss, routers, RunConfig(), topology)
    model.train()
    return FullEngine(loss, RunConfig(), topology)


def with_adapters(model: Any) -> Any:
    """Return the model with LoRA on every projection, of which alone the weights train."""
    with extra("bench"):
        from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapters).get_base_model()


def make_batch(case: Case, vocabulary: int) -> data.Batch:
    """Return random rows, on the CPU as a loader gives them: every token but the first has a
    loss."""
    generator = np.random.default_rng(0)

    def sample(tokens: int) -> data.Row:
        ids = generator.integers(0, vocabulary, tokens, dtype=np.int32)
        supervised = np.arange(tokens) > 0
        return data.Row(input_ids=ids, supervised=supervised, prompt_length=0, source=0)

    rows: list[data.AnyRow] = []
    for _ in range(case.rows):
        segments = tuple(sample(case.real // case.segments) for _ in range(case.segments))
        rows.append(data.PackedRow(segments=segments) if case.segments > 1 else segments[0])
    return data.collate(rows, pad_token_id=0, prompt_tokens=32)


# -- one model


def _measure_depth(part: Part, shape: Shape, setup: Setup, share: float) -> Snapshots:
    torch.manual_seed(0)
    limits = setup.limits(part.turns, share=share)
    engine = make_engine(part.method, shape, setup.device, setup.dtype)
    cases = {case.name: case for case in part.cases}
    batches = {name: make_batch(case, shape.vocabulary) for name, case in cases.items()}
    loss: Any = engine.module
    attentions = attention_by_case(loss.model, part.cases)
    observed: dict[str, Row] = {}

    def step(name: str) -> None:
        engine.train_step([batches[name]], _RATE)

    def observe(name: str) -> None:
        _run_with(loss, attentions[name])
        for _ in range(_WARMUP):
            step(name)
        memory = memory_by_kind(engine, lambda: step(name), setup.device)
        calls = count_calls(lambda: step(name), setup.device)
        observed[name] = {"attention": attentions[name], "memory": memory, **calls}

    def run(name: str) -> Sample:
        _run_with(loss, attentions[name])
        return (setup.watch.seconds(lambda: step(name)),)

    base, *others = cases
    attempts = Attempts(run, observe, base=base)
    # A single case is paired with itself: its ratio is 1, its error that of the clock.
    for pairs in timed_pairs(attempts, others or [base], base, limits):
        own = {name: pairs[name] if name != base else of_base(pairs) for name in cases}
        yield [
            row
            for name, case in cases.items()
            for row in _rows(part, shape, case, own[name], observed, setup, attempts.failed)
        ]


def attention_by_case(model: Any, cases: Sequence[Case]) -> dict[str, str]:
    """Return by case the attention that `megaskip train` would run it with: packed rows have one
    of their own (see choose_packed_attention)."""
    own = packed = attention_of(model)
    if any(case.segments > 1 for case in cases):
        choose_packed_attention(model)
        packed = attention_of(model)
        model.set_attn_implementation(own)
    return {case.name: packed if case.segments > 1 else own for case in cases}


def _run_with(loss: TaskLoss, attention: str) -> None:
    """Let a model run with an attention, told of packed samples as `megaskip train` tells it."""
    model: Any = loss.model
    model.set_attn_implementation(attention)
    loss.takes_lengths = takes_lengths(model)


def memory_by_kind(engine: StepEngine, step: Any, device: torch.device) -> dict[str, int]:
    """Return bytes by kind: what the engine holds, and what a step needs besides at the worst
    moment."""
    kinds = bytes_by_kind(engine)
    return {**kinds, "activations": peak_of(step, device, _held(engine))}


def _held(engine: StepEngine) -> list[Tensor]:
    parameters = [*engine.module.parameters(), *engine.parameters.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    moments = [t for s in engine.optimizer.state.values() for t in s.values()]
    return [*parameters, *engine.module.buffers(), *gradients, *moments]


def _rows(
    part: Part,
    shape: Shape,
    case: Case,
    pairs: Sequence[tuple[Sample, Sample]],
    observed: dict[str, Row],
    setup: Setup,
    failed: set[Any],
) -> list[Row]:
    """Return the row of a case; none where time was up before it ran."""
    row: Row = {"table": "train", "shape": shape.name, "layers": shape.layers}
    row |= {"method": part.method, "case": case.name, **dataclasses.asdict(case)}
    if case.name in failed:
        return [row | {"failure": OUT_OF_MEMORY}]
    if not pairs:
        return []
    seconds = statistics.median(own[0] for _, own in pairs)
    ratio, base = speedup(pairs), part.cases[0]
    as_many = case.rows * case.real / (base.rows * base.real)
    flops = training_flops(
        shape, part.method, case.rows * case.segments, case.real // case.segments
    )
    row |= observed[case.name] | {
        "ms": 1e3 * seconds,
        "ms_error": _scaled(median_error([own[0] for _, own in pairs]), 1e3),
        "tokens_per_second": case.rows * case.real / seconds,
        "speedup": as_many * ratio.value,
        "error": _scaled(ratio.error, as_many),
        "mfu": flops / seconds / setup.speeds.flops,
        "pairs": len(pairs),
        "peak_bytes": sum(observed[case.name]["memory"].values()),
    }
    return [row]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _extrapolated(part: Part, shape: Shape, rows: Sequence[Row]) -> list[Row]:
    """Return what the whole shape would take by a line through two depths."""
    extrapolated = []
    for case in part.cases:
        measured = [r for r in rows if r["case"] == case.name and "ms" in r]
        if len(measured) < 2:
            continue
        many, few = ((row["layers"], row["ms"] / 1e3) for row in measured)
        seconds = extrapolated_seconds(few, many, shape.layers)
        row: Row = {"table": "stack", "shape": shape.name, "method": part.method}
        row |= {"case": case.name, "layers": shape.layers, "measured_layers": [few[0], many[0]]}
        row |= {"ms_a_layer": 1e3 * layer_seconds(few, many)}
        tokens = case.rows * case.real
        extrapolated.append(row | {"extrapolated_tokens_per_second": tokens / seconds})
    return extrapolated
