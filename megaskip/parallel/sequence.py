"""Ranks that share the tokens of rows: their process group, and what a model must have for it.

A rank computes neighbouring columns of every row. Tokens meet in attention alone (ulysses.py), and
in the pooling of decisions about rows, which is added up here, so that all ranks of a group decide
alike.
"""

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaskip.arch.packing import attention_of
from megaskip.arch.positions import rope_settings
from megaskip.data import Batch
from megaskip.errors import ConfigError
from megaskip.parallel.loading.skeleton import skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.topology import Topology, sizes_that
from megaskip.routing import Pooling

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Frequencies that follow from the longest position, which a rank sees of its own tokens only."""


class SequenceGroup:
    """The ranks that share rows with this one."""

    def __init__(self, topology: Topology, *, timeout: int) -> None:
        """Make the process groups of all such ranks; `timeout` in seconds. Collective."""
        self.size, self.rank = topology.sequence_size, topology.sequence_rank
        firsts = range(0, topology.world_size, self.size)
        patience = datetime.timedelta(seconds=timeout)
        groups = [
            dist.new_group(list(range(first, first + self.size)), timeout=patience)
            for first in firsts
        ]
        self.process_group: Any = groups[topology.replica]

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over these ranks, with gradient. Collective among them."""
        total: Tensor = _SumOfRanks.apply(tensor, self.process_group)
        return total

    def shared(self, pooling: Pooling, batch: Batch, *, pool: str) -> Pooling:
        """Return the pooling of a batch that holds a share of the tokens of rows, made of what is
        here, as one of the whole rows; `pool` as in RoutingConfig."""
        if pooling.weights is None:  # a token is pooled and counted where it is
            return dataclasses.replace(pooling, add_up=self.add_up)
        assert pooling.unit_of_token is None, "packed rows are not shared"
        pooled = batch.row_tokens if pool == "all" else batch.row_prompts
        assert pooled is not None, "this batch holds whole rows"
        first = self.rank == 0
        return dataclasses.replace(
            pooling,
            weights=(pooling.weights > 0).float() / pooled.clamp(min=1)[:, None, None],
            # One of the ranks counts a decision; every real row has a token on the first.
            unit_mask=pooling.unit_mask if first else torch.zeros_like(pooling.unit_mask),
            add_up=self.add_up,
        )


class _SumOfRanks(torch.autograd.Function):
    """A sum that every rank of a group has: the losses of all of them add up, so each one's share
    of it gets the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumOfRanks.apply(gradient, ctx.group), None


def require_sequence_parallel(source: ModelSource, size: int) -> None:
    """Raise ConfigError with all that keeps `size` ranks from sharing the rows of a model; before
    its weights are loaded."""
    problems = list(_problems(source, size)) if size > 1 else []
    if problems:
        raise ConfigError(*problems)


def _problems(source: ModelSource, size: int) -> Iterator[str]:
    text = source.text_config
    flag, family = f"--sequence_parallel_size {size}", source.hf_config.model_type
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    others = sizes_that(lambda size: _fits(size, heads, keys), most=heads)
    if heads % size:
        yield f"{flag} does not divide the {heads} attention heads of {source.folder}; {others}"
    elif not _fits(size, heads, keys):
        yield (
            f"{flag} neither divides the {keys} key-value heads of {source.folder} nor is a "
            f"multiple of them; {others}"
        )
    types = {settings["rope_type"] for settings in rope_settings(text)}
    dependent = sorted(types.intersection(_LENGTH_DEPENDENT_ROPE))
    if dependent:
        yield (
            f"{flag}: {family} has rope of type {dependent[0]}, whose frequencies follow from the "
            "longest position, and a rank sees those of its own tokens only; leave the flag out"
        )
    name = attention_of(skeleton(source))
    if name != "sdpa":
        yield (
            f"{flag} exchanges tokens around the attention sdpa, and {family} runs with {name}; "
            "take --attn_implementation sdpa if the family has it"
        )


def _fits(size: int, heads: int, keys: int) -> bool:
    """Return whether `size` ranks can deal out attention heads, and key-value heads, which are
    repeated where they are fewer."""
    return heads % size == 0 and (keys % size == 0 or size % keys == 0)
