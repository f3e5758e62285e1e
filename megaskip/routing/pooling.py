"""Which tokens each decision looks at: made once a batch, used by every routed layer.

Shapes: B rows, T tokens, U units of decision in a row, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """How the tokens of a batch become the units that routers decide about."""

    weights: Tensor | None
    """float32 [B, U, T], each row of real units sums to 1, over all processes that share the rows;
    None when every token is a unit."""
    unit_mask: Tensor
    """bool [B, U], False for units that are padding."""
    token_mask: Tensor
    """bool [B, T], False for padding."""
    unit_of_token: Tensor | None
    """int64 [B, T] for packed rows, else None."""
    choices: int = 1
    """Decisions about each token: more than one where its experts are decided about."""
    add_up: Callable[[Tensor], Tensor] | None = None
    """Returns the sum of a tensor over the processes that share the rows, with gradient; None where
    all tokens of the rows are here. Collective."""

    @classmethod
    def of(
        cls,
        unit: str,
        token_mask: Tensor,
        pooled: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segments: int | None = None,
        *,
        choices: int = 1,
    ) -> "Pooling":
        """Return the pooling for units "sequence" or "token"; arguments as in `sequences`, which
        pools all real tokens without `pooled`, and in `tokens`."""
        if unit == "token":
            return cls.tokens(token_mask, choices)
        return cls.sequences(pooled, token_mask, segment_ids, segments)

    @classmethod
    def tokens(cls, token_mask: Tensor, choices: int = 1) -> "Pooling":
        """Return the pooling in which each token decides for itself, `choices` times: once for each
        of its experts, which then are its units, side by side. `token_mask` is bool [B, T]."""
        return cls(
            weights=None,
            unit_mask=token_mask.repeat_interleave(choices, dim=1) if choices > 1 else token_mask,
            token_mask=token_mask,
            unit_of_token=None,
            choices=choices,
        )

    @classmethod
    def sequences(
        cls,
        pooled: Tensor | None,
        token_mask: Tensor,
        segment_ids: Tensor | None = None,
        segments: int | None = None,
    ) -> "Pooling":
        """Return the pooling in which each row, or each segment of a packed row, is one unit.

        `pooled` bool [B, T] marks the tokens that are averaged (all without it), `token_mask` bool
        [B, T] the real ones; `segment_ids` int64 [B, T] numbers the segments of a row from 0,
        padding is -1; a row has at most `segments`.
        """
        pooled = token_mask if pooled is None else pooled & token_mask
        if segment_ids is None:
            member = torch.ones_like(token_mask).unsqueeze(1)
            unit_of_token = None
        else:
            count = segments or int(segment_ids.max().clamp(min=0)) + 1
            member = (
                segment_ids.unsqueeze(1) == torch.arange(count, device=segment_ids.device)[:, None]
            )
            unit_of_token = segment_ids.clamp(min=0)
        counted = (member & pooled.unsqueeze(1)).float()
        return cls(
            weights=counted / counted.sum(-1, keepdim=True).clamp(min=1),
            unit_mask=(member & token_mask.unsqueeze(1)).any(-1),
            token_mask=token_mask,
            unit_of_token=unit_of_token,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Return (B, T) of the batch."""
        rows, tokens = self.token_mask.shape
        return rows, tokens

    def features(self, hidden_states: Tensor) -> Tensor:
        """Return what the router reads, float32 [B, U, D], from hidden states [B, T, D] of any
        dtype. Collective among processes that share rows."""
        hidden_states = hidden_states.float()
        if self.weights is None:
            return hidden_states
        # Layers may lie on another device than the masks (device_map).
        pooled = torch.bmm(self.weights.to(hidden_states.device), hidden_states)
        return pooled if self.add_up is None else self.add_up(pooled)
