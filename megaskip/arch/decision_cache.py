"""Decisions that live in the KV cache: made at prefill, used in decode, re-indexed with the rows
they belong to.

On a module they would be wrong after a beam search's re-ordering or in a second conversation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from megaskip.routing.decision import RoutingDecision


class DecisionCache:
    """Mixin of a transformers cache that carries each row's decisions."""

    _skip_decisions: dict[int, RoutingDecision]

    @property
    def batch_size(self) -> int:
        """Return the number of rows, of which layers may hold some only; -1 before the first
        pass."""
        return next((len(d.keep) for d in self._skip_decisions.values()), -1)

    max_batch_size = batch_size  # what transformers 5.5 calls it

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Re-order the rows, as beam search does; `beam_idx` int64 [B]."""
        self._skip_select("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> Any:
        """Repeat each row `repeats` times."""
        self._skip_pick(lambda rows: rows.repeat_interleave(repeats))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of `indices`, numbers or a mask."""
        self._skip_select("batch_select_indices", indices)

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        """Shorten the text; one of which nothing is left is judged anew."""
        cropped = super().crop(*args, **kwargs)  # type: ignore[misc]
        if not self.get_seq_length():  # type: ignore[attr-defined]
            self.reset()
        return cropped

    def reset(self) -> None:
        """Forget everything."""
        self._skip_decisions = {}
        super().reset()  # type: ignore[misc]
        for layer in self.layers:  # type: ignore[attr-defined]
            if isinstance(layer, DynamicLayer):
                # transformers 5.5 fills them with zeros, and they stay as long as they were.
                layer.keys = layer.values = None
                layer.is_initialized = False

    def _skip_select(self, method: str, index: Tensor) -> None:
        """Call a layer's method; layers that hold a part choose on the host, so that `index` is
        read once and not by each of them."""
        on_host = index.cpu()
        self._skip_pick(lambda rows: rows[on_host])
        for layer in self.layers:  # type: ignore[attr-defined]
            getattr(layer, method)(on_host if hasattr(layer, "_skip_pick") else index)

    def _skip_pick(self, pick: Callable[[Tensor], Tensor]) -> None:
        old = self._skip_decisions.items()
        self._skip_decisions = {
            k: d.of_rows(pick(torch.arange(len(d.keep), device="cpu"))) for k, d in old
        }


def put_decisions(cache: Any, decisions: Mapping[int, RoutingDecision]) -> None:
    """Let `cache` carry the decisions of its prefill."""
    if not isinstance(cache, DecisionCache):
        cache.__class__ = _deciding_class(type(cache))  # type: ignore[arg-type]
    cache._skip_decisions = {layer: _detached(decision) for layer, decision in decisions.items()}


def cached_decisions(cache: Any) -> dict[int, RoutingDecision]:
    """Return the decisions that `cache` carries; none for a fresh cache."""
    return cache._skip_decisions if isinstance(cache, DecisionCache) else {}


def _detached(decision: RoutingDecision) -> RoutingDecision:
    """Return a decision without gradient; one without keeps what it has computed already."""
    if not decision.keep.requires_grad:
        return decision
    keep, logit = decision.keep.detach(), decision.logit.detach()
    return dataclasses.replace(decision, logit=logit, keep=keep)


@functools.cache
def _deciding_class(base: type) -> type:
    return type(f"Deciding{base.__name__}", (DecisionCache, base), {"__module__": base.__module__})
