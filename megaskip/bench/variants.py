"""Ways to run a model that are compared, and one run of each: decisions are given, not learnt.

Shapes: B rows, T tokens, U units of decision in a row, n new tokens.
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from megaskip.arch import attach_routers, detach_routers, find_decoder
from megaskip.arch.sites import find_sites
from megaskip.config import RouterConfig
from megaskip.inference.dropped import drop_sublayers
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.static_decode import REHEARSALS, DecodeSteps

Keep = dict[int, Tensor]
"""Decisions by layer, float32 [B, U], 1 = run."""
MAP = "+map"
"""End of the name of a variant whose skipped units get a map."""
Override = Callable[[Keep], contextlib.AbstractContextManager[None]]
"""RouterSet.override, or what does nothing for a model without routers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run the model, with its decisions."""

    name: str
    granularity: str = ""
    kv: str = "keep"
    asked: float = 1.0
    rank: int = 0
    """Of the low-rank map that skipped units get, 0 for none."""
    prompt: Keep = dataclasses.field(default_factory=dict)
    steps: tuple[Keep, ...] = ()
    """Decisions about each new token; empty where those of the prompt hold on."""
    static: bool = False
    """Whether it decodes on a static cache, where a GPU plays a recorded step back."""

    @property
    def skips(self) -> tuple[str, ...]:
        """Return what a decision leaves out: attn, mlp or both."""
        target = self.granularity.split("_")[0]
        return ("attn", "mlp") if target == "block" else (target,)

    @property
    def title(self) -> str:
        """Return the name with what is skipped."""
        kv = f" {self.kv}" if self.granularity.endswith("token") else ""
        return f"{self.name} {self.granularity}{kv}".strip()

    @property
    def kept(self) -> float:
        """Return the share of the routed units that it keeps of the prompt."""
        return statistics.mean([float(keep.mean()) for keep in self.prompt.values()] or [1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all variants share: the model, its routed layers and a batch."""

    model: Any
    layers: tuple[int, ...]
    prompt: Tensor
    """int64 [B, T]."""
    answer: Tensor
    """int64 [B, n], the tokens of the decode steps."""


DENSE = Variant(name="dense")


def variants(
    bench: Bench,
    granularities: Sequence[str],
    kvs: Sequence[str],
    capacities: Sequence[float],
    rank: int,
) -> Iterator[Variant]:
    """Yield what is compared with dense; with a `rank`, what skips also with compensations."""
    for variant in _plain_variants(bench, granularities, kvs, capacities):
        yield variant
        if rank and variant.asked < 1:
            yield with_maps(variant, rank)


def _plain_variants(
    bench: Bench, granularities: Sequence[str], kvs: Sequence[str], capacities: Sequence[float]
) -> Iterator[Variant]:
    for granularity in granularities:
        target, unit = granularity.split("_")
        for asked in capacities:
            # An MLP has no keys, and a sequence's are never kept without it.
            for kv in kvs if unit == "token" and target != "mlp" else ("keep",):
                yield routed(bench, granularity, kv, asked)
            if asked < 1 and unit == "sequence":
                yield dropped(bench, granularity, asked)


def with_maps(variant: Variant, rank: int) -> Variant:
    """Return the variant whose skipped units get a low-rank map."""
    return dataclasses.replace(variant, name=f"{variant.name}{MAP}", rank=rank)


def dropped(bench: Bench, granularity: str, asked: float) -> Variant:
    """Return the variant whose sublayers are taken out for good, but for a share `asked`."""
    alike = {
        layer: keep.expand(len(bench.prompt), 1) for layer, keep in spread(bench, 1, asked).items()
    }
    return Variant(name="dropped", granularity=granularity, asked=asked, prompt=alike)


def static(bench: Bench, granularity: str, asked: float) -> Variant:
    """Return the variant that is routed, for sequences, and decodes on a static cache."""
    variant = routed(bench, granularity, "keep", asked)
    return dataclasses.replace(variant, name="static", static=True)


def routed(bench: Bench, granularity: str, kv: str, asked: float) -> Variant:
    """Return the variant whose routers keep a share `asked` of the units."""
    batch, turns = len(bench.prompt), range(bench.answer.shape[1])
    made = functools.partial(Variant, name="routed", granularity=granularity, kv=kv, asked=asked)
    if granularity.endswith("sequence"):
        return made(prompt=spread(bench, batch, asked))
    steps = tuple(spread(bench, batch, asked, turn=turn) for turn in turns)
    return made(prompt=spread_tokens(bench, asked), steps=steps)


def spread(bench: Bench, batch: int, capacity: float, *, turn: int = 0) -> Keep:
    """Return [B, 1] by layer: the share of all cells, dealt out to layers and rows in turn."""
    depth = len(bench.layers)
    total = int(capacity * batch * depth + 0.5)
    keep = {}
    for index, layer in enumerate(bench.layers):
        place = (index + turn) % depth
        rows = torch.arange(total * place // depth, total * (place + 1) // depth) + turn
        cells = torch.zeros(batch, 1).index_fill_(0, rows % batch, 1.0)
        keep[layer] = cells.to(bench.prompt.device)
    return keep


def spread_tokens(bench: Bench, capacity: float) -> Keep:
    """Return [B, T] by layer: the share of every row's tokens, others in every row and layer."""
    batch, tokens = bench.prompt.shape
    total = int(capacity * tokens + 0.5)
    device = bench.prompt.device
    place = torch.arange(batch, device=device)[:, None] + torch.arange(tokens, device=device)
    return {
        layer: ((place + index) * total % tokens < total).float()
        for index, layer in enumerate(bench.layers)
    }


@contextlib.contextmanager
def wired(bench: Bench, variant: Variant) -> Iterator[Override]:
    """Give the model the routers of a variant or drop its sublayers; yields what decides
    for them.

    Afterwards the model is as it was.
    """
    if not variant.prompt:
        yield lambda keep: contextlib.nullcontext()
    elif variant.name.startswith("dropped"):
        with _dropped(bench, variant):
            yield lambda keep: contextlib.nullcontext()
    else:
        config = RouterConfig(
            granularity=variant.granularity,
            layers=bench.layers,
            compensation="low_rank" if variant.rank else "none",
            compensation_rank=variant.rank or 1,
        )
        routers = attach_routers(bench.model, config, verify=False)
        routers.executor = InferenceExecutor(unit=config.unit, kv=variant.kv)
        try:
            yield routers.override
        finally:
            detach_routers(bench.model)


@contextlib.contextmanager
def _dropped(bench: Bench, variant: Variant) -> Iterator[None]:
    parts = find_decoder(bench.model)
    gone = [index for index, keep in variant.prompt.items() if not keep.any()]
    before = []
    for layer in (parts.layers[index] for index in gone):
        sites = find_sites(layer, parts.model_type)
        names = (sites.attention, sites.attention_update, sites.mlp, sites.mlp_update)
        before += [(layer, name, getattr(layer, name)) for name in set(names)]
    maps = {"kind": "low_rank", "rank": variant.rank, variant.skips[0]: gone}
    drop_sublayers(parts, dict.fromkeys(variant.skips, gone), maps if variant.rank else None)
    bench.model.to(bench.prompt.device)
    try:
        yield
    finally:
        for layer, name, module in before:
            setattr(layer, name, module)


def prefill(bench: Bench, variant: Variant, override: Override) -> Any:
    """Run the prompt and return its cache; the last token alone has logits, as in generate()."""
    given: dict[str, Any] = {"input_ids": bench.prompt, "use_cache": True, "logits_to_keep": 1}
    if variant.static:
        tokens = bench.prompt.shape[1] + bench.answer.shape[1]
        cache = StaticCache(config=bench.model.config, max_cache_len=tokens)
        given["past_key_values"] = cache
    with override(variant.prompt):
        output = bench.model(**given)
    return output.past_key_values


def decode(bench: Bench, variant: Variant, override: Override, cache: Any) -> Iterator[int]:
    """Run the tokens of the answer one after the other; yields the number of each after it."""
    run = _static_step(bench, cache) if variant.static else _eager_step(bench, cache)
    for step, ids in enumerate(bench.answer.split(1, dim=1)):
        with override(variant.steps[step] if variant.steps else variant.prompt):
            run(step, ids)
        yield step


def first_steps(bench: Bench, variant: Variant) -> int:
    """Return how many decode steps a variant takes before all are alike: on a static cache the last
    of them is recorded."""
    return min(REHEARSALS + 1, bench.answer.shape[1] - 1) if variant.static else 0


def _eager_step(bench: Bench, cache: Any) -> Callable[[int, Tensor], None]:
    return lambda _, ids: bench.model(input_ids=ids, past_key_values=cache, use_cache=True)


def _static_step(bench: Bench, cache: Any) -> Callable[[int, Tensor], None]:
    """Return what runs one more token as generate() does, which makes its mask and position."""
    run, first = DecodeSteps(bench.model), bench.prompt.shape[1]
    places = torch.arange(first, first + bench.answer.shape[1], device=bench.prompt.device)

    def step(number: int, ids: Tensor) -> None:
        inputs = bench.model.prepare_inputs_for_generation(
            ids,
            position_ids=places[None, number : number + 1],
            past_key_values=cache,
            use_cache=True,
        )
        run(**inputs)

    return step
