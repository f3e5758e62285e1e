"""Attention on fake tensors as real ones run it: without a mask where rows are not packed, and with
the shapes and copies of ranks that share the tokens of rows, without ranks and without DeepSpeed
(ulysses.py is the real one).

Shapes: B rows, T tokens of a rank, S ranks, H heads, K key-value heads, E elements of a head.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from megaskip.arch.packing import attention_of


def plan_attention(model: Any, size: int) -> None:
    """Let a model on fake tensors run as one of `size` ranks that share rows, which are not
    packed."""
    own = AttentionInterface()[attention_of(model)]
    _run_with(model, _shared(own, size), f"of_{size}_ranks", size)


def plan_without_mask(model: Any) -> None:
    """Let a model on fake tensors run whole rows, which are not packed. Eager attention keeps its
    mask, which is small beside the scores that it writes down."""
    own = attention_of(model)
    if own in AttentionInterface():
        _run_with(model, _whole(AttentionInterface()[own]), "without_mask", 1)


def _run_with(model: Any, attention: Callable[..., Any], suffix: str, size: int) -> None:
    """Let `model` run with `attention` on rows that `size` ranks share, without a mask."""
    own = attention_of(model)
    name = f"planned_{own}_{suffix}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask(AttentionMaskInterface()[own], size))
    model.set_attn_implementation(name)


def _whole(own: Callable[..., Any]) -> Callable[..., Any]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **told: Any
    ) -> tuple[Tensor, Any]:
        """Shapes as below; kernels repeat the keys and values of groups, which fake ones do not."""
        repeated = getattr(module, "num_key_value_groups", 1)
        try:
            module.num_key_value_groups = 1
            whole = (x.repeat_interleave(repeated, dim=1) for x in (key, value))
            return own(module, query, *whole, mask, **told)
        finally:
            module.num_key_value_groups = repeated

    return attend


def _shared(own: Callable[..., Any], size: int) -> Callable[..., Any]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **told: Any
    ) -> tuple[Tensor, Any]:
        """`query` [B, H, T, E], `key` and `value` [B, K, T, E]; returns ([B, T, H, E], None)."""
        rows, heads, tokens, elements = query.shape
        copies = max(size // key.shape[1], 1)
        received = [
            _received(tensor, size)
            for tensor in (query, *(x.repeat_interleave(copies, dim=1) for x in (key, value)))
        ]
        repeated = module.num_key_value_groups
        try:
            module.num_key_value_groups = received[0].shape[1] // received[1].shape[1]
            output, _ = own(module, *received, mask, **told)
        finally:
            module.num_key_value_groups = repeated
        return output.clone().view(rows, tokens, heads, elements), None

    return attend


def _received(tensor: Tensor, size: int) -> Tensor:
    """Return [B, H / S, S * T, E] for a tensor [B, H, T, E], copied once to be sent and once when
    it has come."""
    rows, heads, tokens, elements = tensor.shape
    sent = tensor.clone()
    return sent.reshape(rows, heads // size, size * tokens, elements).clone()


def _mask(own: Callable[..., Any], size: int) -> Callable[..., Any]:
    def whole(*, q_length: int, kv_length: int, local_size: int | None = None, **told: Any) -> Any:
        # Outside of fake tensors transformers makes none for plain causal attention, nor for a
        # window that holds all tokens.
        if local_size is None or size * kv_length <= local_size:
            return None
        lengths = {"q_length": size * q_length, "kv_length": size * kv_length}
        return own(**lengths, local_size=local_size, **told)

    return whole
