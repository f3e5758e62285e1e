"""The gate of a layer that learns: it multiplies by the decision, which carries the gradient.

Shapes: B rows, T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megaskip.routing.gate import Gate


class TrainingGate(Gate):
    """A gate that also goes with executors that compute what is skipped, or leave no zeros there.

    With an executor of inference it does what any gate does.
    """

    observe: Callable[[Tensor, Tensor], object] | None = None
    """Told what a sublayer reads and the update it returns, [B, T, D] each, at each pass of
    training executors; for a compensation to be fitted."""

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"observe": None}

    def apply(self, update: Tensor, site: str) -> Tensor:
        """Return the update [B, T, D] of what is kept and the compensation of what is skipped, in
        the update's dtype."""
        if self._state.executor.leaves_zeros:
            return super().apply(update, site)
        read = self._take_input()
        if read is not None and self.observe is not None:
            self.observe(read, update)
        keep = self._multiplier(update)
        kept = update * keep
        return kept if read is None else kept + self._compensation(read) * (1 - keep)

    def mix(self, hidden_states: Tensor, output: Tensor) -> Tensor:
        """Return x + keep * (output - x) + (1 - keep) * compensation, written so that it is exact
        at keep 0 and 1; all [B, T, D]."""
        if self._state.executor.leaves_zeros:
            return super().mix(hidden_states, output)
        read, keep = self._take_input(), self._multiplier(output)
        if read is None:
            return output * keep + hidden_states * (1 - keep)
        if self.observe is not None:
            self.observe(read, output - hidden_states)
        return output * keep + (hidden_states + self._compensation(read)) * (1 - keep)

    def _weighted(self, weights: Tensor) -> Tensor:
        if self._state.executor.leaves_zeros:
            return weights
        return weights * self._decided().keep.view_as(weights).to(weights.dtype)

    def _multiplier(self, like: Tensor) -> Tensor:
        return self._decided().per_token().unsqueeze(-1).to(like.dtype)
