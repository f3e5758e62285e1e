"""Decisions that live in the KV cache: made at prefill, used in decode, re-indexed with the rows
they belong to.

On a module they would be wrong after a beam search's re-ordering or in a second conversation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from megaskip.routing.decision import RoutingDecision


class DecisionCache:
    """Mixin of a transformers cache that carries each row's decisions."""

    _skip_decisions: dict[int, RoutingDecision]

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        """Re-order the rows, as beam search does; `beam_idx` int64 [B]."""
        self._skip_pick(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        """Repeat each row `repeats` times."""
        self._skip_pick(lambda tensor: tensor.repeat_interleave(repeats, dim=0))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        """Keep the rows of `indices`."""
        self._skip_pick(lambda tensor: tensor[indices.to(tensor.device)])
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        """Shorten the text; one of which nothing is left is judged anew."""
        cropped = super().crop(*args, **kwargs)  # type: ignore[misc]
        if not self.get_seq_length():  # type: ignore[attr-defined]
            self.reset()
        return cropped

    def reset(self) -> Any:
        """Forget everything."""
        self._skip_decisions = {}
        return super().reset()  # type: ignore[misc]

    def _skip_pick(self, pick: Callable[[Tensor], Tensor]) -> None:
        self._skip_decisions = {
            layer: dataclasses.replace(
                decision,
                logit=pick(decision.logit),
                keep=pick(decision.keep),
                unit_mask=pick(decision.unit_mask),
            )
            for layer, decision in self._skip_decisions.items()
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
