"""The batch of one step: where each request's tokens are, and the same batch with some rows alone.

Shapes: N tokens of all requests, R requests.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import subclass_attention_backend

from megaskip.routing.copies import copy_to
from megaskip.serving.vllm.requests import ServedRequest, ServedRequests


class RememberingBuilder:
    """Mixin of a backend's metadata builder: what it built can be built again for some rows."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Return the backend's metadata of a batch, with the batch beside it."""
        build = super().build  # type: ignore[misc]
        metadata = build(common_prefix_len, common_attn_metadata, *args, **kwargs)
        metadata.megaskip_source = (build, common_attn_metadata)
        return metadata


@functools.cache
def remembering_backend(backend: Any) -> Any:
    """Return an attention backend whose metadata can be built again for some rows."""
    builder = backend.get_builder_cls()
    name = f"Remembering{builder.__name__}"
    made = type(name, (RememberingBuilder, builder), {"__module__": __name__})
    return subclass_attention_backend("Megaskip", backend, made)


class Batch:
    """The requests of one step and their tokens."""

    def __init__(self, common: Any, requests: ServedRequests) -> None:
        starts: list[int] = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        self._spans = list(itertools.pairwise(starts))
        # The second runner says in which slot each row's request is; in the first, rows are all.
        numbers = range(len(self._spans)) if common.req_idx is None else common.req_idx.tolist()
        self.requests = requests.of(numbers)
        """By row; none where vLLM tries the model out before the first request."""
        spans = zip(lengths, self._spans, strict=True)
        self._computed = [length - (end - start) for length, (start, end) in spans]
        self._selected: dict[tuple[int, ...], Tensor] = {}

    def prompts(self, layer: int) -> Iterator[tuple[ServedRequest, slice]]:
        """Yield the requests that a layer has not decided about, with their prompts' tokens.

        Raises RuntimeError where a prompt is not in this step as a whole.
        """
        rows = zip(self.requests, self._spans, self._computed, strict=True)
        for request, (start, end), computed in rows:
            if layer in request.runs:
                continue
            if computed or end - start < request.prompt_tokens:
                raise RuntimeError(
                    f"megaskip: a prompt of {request.prompt_tokens} tokens came in pieces "
                    f"({computed} computed before, {end - start} now), and a router reads it as a "
                    "whole"
                )
            yield request, slice(start, start + request.prompt_tokens)

    def running(self, layer: int) -> tuple[int, ...]:
        """Return the rows for which a layer's sublayer runs."""
        return tuple(row for row, request in enumerate(self.requests) if request.runs[layer])

    def others(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the rows that are not among `rows`."""
        return tuple(sorted(set(range(len(self.requests))).difference(rows)))

    def token_index(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the tokens of some rows, int64, ascending; made once a step."""
        index = self._selected.get(rows)
        if index is None:
            spans = [torch.arange(*self._spans[row]) for row in rows]
            index = copy_to(torch.cat(spans), device)
            self._selected[rows] = index
        return index


@contextlib.contextmanager
def only_rows(batch: Batch, rows: tuple[int, ...], names: Sequence[str]) -> Iterator[None]:
    """Let the attention layers of `names` see a batch of these rows alone."""
    context = get_forward_context()
    before = {name: context.attn_metadata[name] for name in names}
    slots = {name: context.slot_mapping.get(name) for name in names}
    for name in names:
        context.attn_metadata[name] = metadata = _metadata_of(before[name], batch, rows)
        if slots[name] is not None:
            context.slot_mapping[name] = metadata.megaskip_slots
    try:
        yield
    finally:
        context.attn_metadata.update(before)
        context.slot_mapping.update({k: v for k, v in slots.items() if v is not None})


def _metadata_of(metadata: Any, batch: Batch, rows: tuple[int, ...]) -> Any:
    """Return metadata for some rows, built once a step for all layers that share it."""
    made = metadata.__dict__.setdefault("megaskip_rows", {})
    if rows not in made:
        build, common = metadata.megaskip_source
        selected = _select(common, batch, rows)
        made[rows] = build(0, selected)
        made[rows].megaskip_slots = selected.slot_mapping
    return made[rows]


def _select(common: Any, batch: Batch, rows: tuple[int, ...]) -> Any:
    """Return the description of a batch of some rows, from that of all."""
    device = common.query_start_loc.device
    on_host = torch.tensor(rows, dtype=torch.int64)
    index = copy_to(on_host, device)
    tokens = batch.token_index(rows, device)
    starts = common.query_start_loc_cpu
    lengths = (starts[1:] - starts[:-1])[on_host]
    begins = torch.zeros(len(rows) + 1, dtype=starts.dtype)
    torch.cumsum(lengths, 0, out=begins[1:])
    bound = common.seq_lens_cpu_upper_bound[on_host]
    return dataclasses.replace(
        common,
        query_start_loc=copy_to(begins, device),
        query_start_loc_cpu=begins,
        seq_lens=common.seq_lens[index],
        seq_lens_cpu_upper_bound=bound,
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=int(lengths.max()),
        max_seq_len=int(bound.max()),
        block_table_tensor=common.block_table_tensor[index],
        slot_mapping=common.slot_mapping[tokens],
        positions=None if common.positions is None else common.positions[..., tokens],
        req_idx=None if common.req_idx is None else common.req_idx[list(rows)],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[on_host],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
