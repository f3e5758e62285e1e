"""Attention over tokens that several ranks hold, through DeepSpeed's Ulysses; and the proof of it.

In front of the attention proper each rank gives away its tokens for some of the heads and gets all
tokens for the heads that it keeps; behind it the other way round. This happens where transformers
asks for an attention function, so it is inside of whatever a routed attention leaves out. Shapes: B
rows, T tokens of a rank, S ranks, H heads, K key-value heads, E elements of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from megaskip.arch.packing import attention_of
from megaskip.arch.task_loss import TaskLoss
from megaskip.errors import UnsupportedModelError
from megaskip.extras import extra
from megaskip.parallel.sequence import SequenceGroup

with extra("train"):
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

_TOKENS = 8
"""Of a rank, in the proof."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the norm of the hidden states; TF32 rounds to 1e-3, tokens that miss others differ by
tenths."""
_TOLERANCE_16_BIT = 5e-2


def share_attention(loss: TaskLoss, group: SequenceGroup) -> None:
    """Let the model's attention see the tokens of all ranks of `group`, and prove that it does.

    Collective. Raises UnsupportedModelError where a rank's hidden states are not those that it has
    with the whole row: of families in which tokens meet elsewhere, too.
    """
    deepspeed.comm.init_distributed(verbose=False)
    own = attention_of(loss.model)
    name = f"{own}_of_{group.size}_ranks"
    AttentionInterface.register(name, _attention(AttentionInterface()[own], group))
    AttentionMaskInterface.register(name, _mask(AttentionMaskInterface()[own], group.size))
    whole = _states(loss, group, columns=slice(None))
    loss.model.set_attn_implementation(name)  # type: ignore[operator]
    columns = slice(group.rank * _TOKENS, (group.rank + 1) * _TOKENS)
    shared, expected = _states(loss, group, columns=columns), whole[:, columns]
    distance = float((shared - expected).norm() / expected.norm())
    tolerance = _TOLERANCE.get(next(loss.model.parameters()).dtype, _TOLERANCE_16_BIT)
    # Written so that NaN fails; added up, so that all ranks go on or none.
    fails = torch.tensor(float(not distance <= tolerance), device=shared.device)
    if float(group.add_up(fails)):
        config: Any = loss.model.config
        raise UnsupportedModelError(
            f"{config.model_type}: {group.size} ranks that share the tokens of a row do not "
            f"compute what one does (hidden states differ by {distance:.1e} on rank {group.rank} "
            "of them); "
            "leave --sequence_parallel_size out"
        )


@torch.no_grad()
def _states(loss: TaskLoss, group: SequenceGroup, *, columns: slice) -> Tensor:
    """Return the hidden states float32 [1, T, D] of some columns of a short row."""
    device = next(tensor for tensor in (*loss.model.parameters(), *loss.model.buffers())).device
    places = torch.arange(group.size * _TOKENS, device=device)[None]
    return loss.hidden_states(places[:, columns] + 1, None, places[:, columns]).float()


def _attention(own: Callable[..., Any], group: SequenceGroup) -> Callable[..., Any]:
    """Return an attention function, as transformers calls them, that runs `own` on all tokens of
    this rank's heads. Collective among the ranks of `group`."""

    def run(module: nn.Module, *tensors: Any, **told: Any) -> Any:
        del told["position_ids"]  # rows are not packed, so attention has no use for them
        return own(module, *tensors, **told)

    @functools.lru_cache(maxsize=64)
    def exchange(rows: int, heads: int, key_heads: int, elements: int) -> UlyssesSPAttentionHF:
        return UlyssesSPAttentionHF(
            attn=run,
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=elements,
            kv_head_count=key_heads,
            num_hidden_layers=0,
            process_group=group.process_group,
            seq_length_is_variable=True,
        )

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **told: Any
    ) -> tuple[Tensor, Any]:
        """`query` [B, H, T, E], `key` and `value` [B, K, T, E]; returns ([B, T, H, E], None)."""
        if value.shape != key.shape:
            raise UnsupportedModelError(
                f"{module.config.model_type}: its keys have {key.shape[-1]} elements and its "
                f"values {value.shape[-1]}, which ranks that share the tokens of a row cannot "
                "exchange; leave --sequence_parallel_size out"
            )
        rows, heads, tokens, elements = query.shape
        first = group.rank * tokens
        # DeepSpeed gathers positions, and asserts that they are there.
        told["position_ids"] = torch.arange(first, first + tokens, device=query.device)[None]
        repeated = vars(module).get("num_key_value_groups")
        try:
            shared = exchange(rows, heads, key.shape[1], elements)
            output, weights = shared(module, query, key, value, mask, **told)
        finally:
            if repeated is not None:
                # DeepSpeed sets it where it repeats key-value heads, fewer than ranks.
                module.num_key_value_groups = repeated
        return output.view(rows, tokens, heads, elements), weights

    return attend


def _mask(own: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Return a mask function, as transformers calls them, for the tokens of all ranks."""

    def whole(*, q_length: int, kv_length: int, **told: Any) -> Any:
        return own(q_length=size * q_length, kv_length=size * kv_length, **told)

    return whole
