"""Proof by numbers that a family can be cut into stages: on a tiny random copy, before any weight
is loaded."""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.neighbours import connect
from megaskip.arch.padding import needs_mask
from megaskip.arch.stage import DecoderStage, LayerRange, cut, layer_ranges
from megaskip.arch.task_loss import TaskLoss, verify_task_loss
from megaskip.errors import UnsupportedModelError

_TINY_DEPTH = 8
_TINY_WIDTH = 64
"""Of MLPs and vocabulary."""
_CHUNK_TOKENS = 64
_TOLERANCE = 1e-5
"""Of the largest value; float32 rounding is about 1e-7 an operation."""


@torch.no_grad()
def verify_stages(
    config: Any, build: Callable[[Any], nn.Module], *, generates: bool = False
) -> bool:
    """Raise UnsupportedModelError unless stages of a tiny random copy compute what the whole does;
    return whether it needs a mask for padding (padding.py), which no stage can find out alone.

    Compares the hidden states of a batch as in training or, if the stages are to be used as it
    `generates`, the logits of a prompt and of a token after it with the cache. `build` makes a
    model of a config. Every rank calls it by itself; takes well under a second.
    """
    distance = _distance_of_logits if generates else _distance_of_states
    try:
        whole = build(tiny_config(config)).float().eval()
        verify_task_loss(TaskLoss(whole, chunk_tokens=_CHUNK_TOKENS))
        masked = needs_mask(whole)
        error = distance(whole)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as problem:
        raise UnsupportedModelError(
            f"{config.model_type}: a tiny copy of this family, which would show that it can be cut "
            f"into stages, does not run ({type(problem).__name__}: {problem}). Use ZeRO-3 "
            "(ds_configs/zero3.json)"
        ) from None
    # Written so that NaN fails too.
    if not error <= _TOLERANCE:
        compared = "logits" if generates else "hidden states"
        raise UnsupportedModelError(
            f"{config.model_type}: cut into stages, a tiny copy of this family computes something "
            f"else than in one piece (relative distance of its {compared} {error:.1e}, at most "
            f"{_TOLERANCE:.0e}). Use ZeRO-3 (ds_configs/zero3.json)"
        )
    return masked


def tiny_config(config: Any) -> Any:
    """Return a copy of a model config with its widths cut down; what shapes the computation stays.

    Heads keep their size, for rotary embeddings may list a factor for each of their dimensions.
    """
    tiny = copy.deepcopy(config)
    text = tiny.get_text_config(decoder=True)
    depth, heads = text.num_hidden_layers, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", heads) < heads
    keep = min(depth, _TINY_DEPTH)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text, name, value[:keep])
        elif name.endswith("intermediate_size") and isinstance(value, int):
            setattr(text, name, _TINY_WIDTH)
        elif name.endswith("_token_id"):
            setattr(text, name, None)
    text.num_hidden_layers = keep
    text.num_attention_heads, text.hidden_size = 2, 2 * head_dim
    text.vocab_size = _TINY_WIDTH
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = 1 if shared else 2
    return tiny


def _ranges_of(whole: nn.Module) -> tuple[LayerRange, ...]:
    """Return up to four stages, among them one of a single layer and one of two layers."""
    depth = len(find_decoder(whole).layers)
    boundaries = {min(depth - 1, layer) for layer in (1, depth // 2, depth - 2) if layer > 0}
    return layer_ranges(sorted(boundaries), depth)


# -- as in training


def _distance_of_states(whole: nn.Module) -> float:
    """Return how far the stages' hidden states are from those of `whole`, relative to them."""
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    positions = torch.arange(12).expand(2, 12)
    call = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    truth = find_decoder(whole).decoder(input_ids=ids, **call)[0]
    hidden: Tensor = ids
    for layers in _ranges_of(whole):
        stage = DecoderStage(copy.deepcopy(whole), layers, chunk_tokens=_CHUNK_TOKENS)
        hidden = stage(hidden, mask, positions)
    real = mask.bool()
    return float((hidden - truth)[real].abs().max() / truth[real].abs().max())


# -- as in generation


class _Queue:
    """Neighbours in one process: the stages run one after the other."""

    def __init__(self) -> None:
        self.shares_logits = False
        self._sent: deque[Tensor] = deque()

    def send(self, tensors: Sequence[Tensor]) -> None:
        self._sent.extend(tensors)

    def receive(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._sent.popleft() for _ in tensors]

    def spread(self, logits: Tensor) -> None:
        raise NotImplementedError

    def take(self, logits: Tensor) -> Tensor:
        raise NotImplementedError


def _distance_of_logits(whole: nn.Module) -> float:
    """Return how far the stages' logits are from those of `whole`, relative to them."""
    queue, stages = _Queue(), []
    for layers in _ranges_of(whole):
        model = copy.deepcopy(whole)
        cut(model, layers)
        connect(model, layers, None, queue)
        stages.append(model)
    ids = torch.arange(1, 27).reshape(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    truth, logits = _two_calls([whole], ids, mask), _two_calls(stages, ids, mask)
    return float((logits - truth).abs().max() / truth.abs().max())


def _two_calls(stages: Sequence[Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits [2, B, V] of a prompt's last token and of the token after it."""
    caches: list[Any] = [None] * len(stages)
    logits = []
    for tokens, seen in ((ids[:, :-1], mask[:, :-1]), (ids[:, -1:], mask)):
        for index, model in enumerate(stages):
            call = {"attention_mask": seen, "past_key_values": caches[index], "use_cache": True}
            out = model(input_ids=tokens, **call)
            caches[index] = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(logits)
