"""The parts of a report in order of value, and what each needs at least. Pure: nothing is run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megaskip.bench.costs import prefill_flops, serving_bytes, training_bytes, training_flops
from megaskip.bench.setup import Speeds
from megaskip.bench.shapes import SHAPES, Shape

GPU, CPU = "gpu", "cpu"

_EFFICIENCY = 0.3
"""Share of a matrix product's speed that whole models are expected to reach."""
_LAYER_SECONDS = 0.0007
"""Of a decode step, for launches: 21.7 ms for 32 layers on an H200 (docs/speed.md)."""
_BUILD_BANDWIDTH = {GPU: 5e9, CPU: 1e8}
"""Bytes of random weights a second."""
_FIXED_SECONDS = {"machine": 3.0, "routing": 5.0, "zero3": 25.0, "train": 2.0, "serve": 2.0}
_LEAST_STEPS = 14
"""Steps of a training before its first pair of two cases: warm-up, memory, profile, pair."""
_LEAST_RUNS = 9
"""Runs of prefill and decode before the first pairs of two variants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows that a training step reads."""

    name: str
    rows: int
    real: int
    """Tokens of a row, padding left out."""
    segments: int = 1
    """Samples that are packed into a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is measured on one model, one after the other, and written together."""

    name: str
    kind: str
    """What is measured: machine, train or serve; or the check routing or zero3, that two ways give
    the same numbers."""
    seconds: float
    """Time after which it begins no new run."""
    shape: str = ""
    layers: int = 0
    """Measure this depth and half of it instead of the whole model; 0 for the whole."""
    method: str = ""
    cases: tuple[Case, ...] = ()
    """Of a training; the first is what the others are compared with."""
    batch: int = 0
    prompt: int = 0
    steps: int = 0
    """New tokens of each row in decode."""
    turns: int = 9

    @property
    def library(self) -> str | None:
        """Return the optional library that it cannot do without."""
        return {"lora": "peft"}.get(self.method) or {"zero3": "deepspeed"}.get(self.kind)

    @property
    def measured_shape(self) -> Shape:
        """Return the shape that is built."""
        shape = SHAPES[self.shape]
        return replace(shape, layers=self.layers) if self.layers else shape


def parts_for(device: str) -> tuple[Part, ...]:
    """Return the parts of a report for a kind of device, in the order in which they are run."""
    parts = tuple(_gpu_parts() if device == GPU else _cpu_parts())
    return (
        Part(name="machine", kind="machine", seconds=10),
        Part(name="routing", kind="routing", seconds=10),
        *parts,
    )


def least_seconds(part: Part, device: str, speeds: Speeds, element: int) -> float:
    """Return about how long a part takes until it has measured anything worth keeping.

    `element` is the bytes of a weight.
    """
    seconds = _FIXED_SECONDS[part.kind]
    if not part.shape:
        return seconds
    shape = part.measured_shape
    seconds += element * shape.parameters / _BUILD_BANDWIDTH[device]
    rate = _EFFICIENCY * speeds.flops
    if part.kind == "train":
        base = part.cases[0]
        flops = training_flops(shape, part.method, base.rows, base.real)
        step = flops / rate + 3 * shape.layers * _LAYER_SECONDS
        return seconds + _LEAST_STEPS * step * (1.5 if part.layers else 1)
    read = element * (shape.parameters + 3 * part.batch * shape.kv_values(part.prompt))
    step = shape.layers * _LAYER_SECONDS + read / speeds.bandwidth
    prefill = prefill_flops(shape, part.batch, part.prompt) / rate
    return seconds + _LEAST_RUNS * (prefill + part.steps * step)


def needed_bytes(part: Part, element: int) -> int:
    """Return about the most bytes that a part holds at once on the device: for its first case,
    because others may be left out."""
    if not part.shape:
        return 0
    shape = part.measured_shape
    if part.kind == "serve":
        return serving_bytes(shape, part.batch, part.prompt, element)
    base = part.cases[0]
    return training_bytes(shape, part.method, base.rows, base.real, element)


# -- which parts there are


def _gpu_parts() -> Iterator[Part]:
    lengths = (Case(name="8192", rows=1, real=8192), Case(name="2 x 2048", rows=2, real=2048))
    yield _train("llama3-8b", "routers", 30, _cases(4096) + lengths)
    yield _train("llama3-8b", "lora", 22, _cases(4096)[:1] + lengths)
    yield _serve("llama3-8b", 1, 2048, 45)
    yield _serve("llama3-8b", 16, 2048, 45)
    for method in ("routers", "lora"):
        yield _train("llama3-70b", method, 24, _cases(4096)[:1], layers=8)
    for method in ("routers", "lora", "full"):
        yield _train("llama3-1b", method, 10, _cases(4096))
    yield _serve("llama3-8b", 1, 8192, 35)
    yield _serve("llama3-8b", 64, 2048, 45)
    yield _train("llama3-8b", "full", 20, _cases(4096)[:1])
    yield Part(name="zero3", kind="zero3", seconds=60)
    for batch, prompt in ((1, 32768), (16, 8192), (64, 8192), (16, 32768), (64, 32768)):
        yield _serve("llama3-8b", batch, prompt, 40)


def _cpu_parts() -> Iterator[Part]:
    for method in ("routers", "lora", "full"):
        yield _train("tiny", method, 20, _cases(256))
    for batch in (1, 4):
        yield _serve("tiny", batch, 128, 30)
    for method in ("routers", "lora"):
        yield _train("tiny", method, 16, _cases(256)[:1], layers=6)
    yield Part(name="zero3", kind="zero3", seconds=60)
    for method in ("routers", "lora", "full"):
        yield _train("demo-110m", method, 40, _cases(256, rows=2)[:1])
    for batch, prompt in ((1, 128), (4, 128), (1, 512)):
        yield _serve("demo-110m", batch, prompt, 60)


def _cases(tokens: int, rows: int = 1) -> tuple[Case, ...]:
    """Return rows of so many tokens without padding, with 7 padded tokens, and packed."""
    plain = f"{tokens}" if rows == 1 else f"{rows} x {tokens}"
    return (
        Case(name=plain, rows=rows, real=tokens),
        Case(name=f"{plain} padded", rows=rows, real=tokens - 7),
        Case(name=f"{plain} packed", rows=rows, real=tokens, segments=4),
    )


def _train(
    shape: str, method: str, seconds: float, cases: tuple[Case, ...], *, layers: int = 0
) -> Part:
    name = f"train-{shape}-{method}" + (f"-{layers}-layers" if layers else "")
    return Part(
        name=name,
        kind="train",
        seconds=seconds,
        shape=shape,
        method=method,
        cases=cases,
        layers=layers,
    )


def _serve(shape: str, batch: int, prompt: int, seconds: float) -> Part:
    return Part(
        name=f"serve-{shape}-batch-{batch}-prompt-{prompt}",
        kind="serve",
        seconds=seconds,
        shape=shape,
        batch=batch,
        prompt=prompt,
        steps=16,
    )
