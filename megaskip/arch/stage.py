"""One stage of a pipeline: an HF base model with a slice of its layers. Knows modules, not ranks.

No modelling is copied: the base model runs its own loop over fewer layers, fed with hidden states
instead of token ids. Proven on a tiny copy of the family before any weight is loaded.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import DecoderParts, find_decoder
from megaskip.arch.task_loss import TaskLoss, head_loss, verify_task_loss
from megaskip.errors import UnsupportedModelError

REPEATED = {"embedding_multiplier": "granite scales whatever it is fed, in every call"}
"""Attributes of a base model that act on its input: neutral from the second stage on."""
_TINY_DEPTH = 8
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Which layers of a model a stage holds."""

    first: int
    stop: int
    """One past the last layer."""
    depth: int
    """Layers of the whole model."""

    @property
    def is_first(self) -> bool:
        """Return whether the stage embeds token ids."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Return whether the stage has the final norm and the output embedding."""
        return self.stop == self.depth

    def owned(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return those of `layers` that lie in this stage."""
        return tuple(layer for layer in layers if self.first <= layer < self.stop)


def slices(boundaries: Sequence[int], depth: int) -> tuple[Slice, ...]:
    """Return the stages whose first layers, but for the first stage's, are `boundaries`."""
    edges = (0, *boundaries, depth)
    return tuple(
        Slice(first=first, stop=stop, depth=depth)
        for first, stop in zip(edges, edges[1:], strict=False)
    )


class DecoderStage(nn.Module):
    """The part of a causal LM that one stage runs. Takes the model apart; its parameters stay."""

    def __init__(self, model: nn.Module, part: Slice, *, chunk_tokens: int) -> None:
        super().__init__()
        parts = find_decoder(model)
        self.config = model.config
        self.part = part
        self.head = head_loss(model, chunk_tokens) if part.is_last else None
        self.decoder = _cut(parts, part)
        self.hidden_size = parts.hidden_size

    def get_decoder(self) -> nn.Module:
        """Return the sliced base model, as an HF model does."""
        return self.decoder

    def forward(
        self, inputs: Tensor, attention_mask: Tensor | None, position_ids: Tensor
    ) -> Tensor:
        """Return hidden states [B, T, D], after the final norm on the last stage.

        `inputs` are token ids [B, T] on the first stage, hidden states [B, T, D] on the others.
        """
        return self.decoder(  # type: ignore[no-any-return]
            **{"input_ids" if self.part.is_first else "inputs_embeds": inputs},
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )[0]


def _cut(parts: DecoderParts, part: Slice) -> nn.Module:
    """Leave a base model the layers of one stage; layers keep their own index and config."""
    decoder: Any = parts.decoder
    if not isinstance(getattr(decoder, "norm", None), nn.Module):
        raise UnsupportedModelError(
            f"{parts.model_type}: {type(decoder).__name__} has no final norm called `norm`; "
            "megaskip cannot cut it into stages. Use ZeRO-3 (ds_configs/zero3.json)"
        )
    decoder.layers = nn.ModuleList(parts.layers[part.first : part.stop])
    decoder.config = config_slice(decoder.config, part)
    if not part.is_first:
        decoder.set_input_embeddings(None)
        for name in REPEATED:
            if hasattr(decoder, name):
                setattr(decoder, name, 1.0)
    if not part.is_last:
        decoder.norm = nn.Identity()
    return decoder  # type: ignore[no-any-return]


def config_slice(config: Any, part: Slice) -> Any:
    """Return a copy in which everything that has an entry for each layer has the stage's only."""
    sliced = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == part.depth:
            setattr(sliced, name, value[part.first : part.stop])
    sliced.num_hidden_layers = part.stop - part.first
    return sliced


# -- proof


@torch.no_grad()
def verify_stages(
    config: Any,
    build: Callable[[Any], nn.Module],
    *,
    distance: Callable[[nn.Module], float] | None = None,
    what: str = "hidden states",
) -> None:
    """Raise UnsupportedModelError unless stages of a tiny random copy compute what the whole does.

    `build` makes a model of a config; `distance` says how far its stages' `what` is from its own
    [hidden states of training stages]. Every rank calls it by itself; takes well under a second.
    """
    try:
        whole = build(tiny_config(config)).float().eval()
        verify_task_loss(TaskLoss(whole, chunk_tokens=64))
        error = (distance or _distance)(whole)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as problem:
        raise UnsupportedModelError(
            f"{config.model_type}: a tiny copy of this family, which would show that it can be cut "
            f"into stages, does not run ({type(problem).__name__}: {problem}). Use ZeRO-3 "
            "(ds_configs/zero3.json)"
        ) from None
    teach = ", or teach REPEATED in megaskip/arch/stage.py what this base model does to its input"
    cure = teach if distance is None else ""
    # Written so that NaN fails too.
    if not error <= _TOLERANCE:
        raise UnsupportedModelError(
            f"{config.model_type}: cut into stages, a tiny copy of this family computes something "
            f"else than in one piece (relative distance of its {what} {error:.1e}, at most "
            f"{_TOLERANCE:.0e}). Use ZeRO-3 (ds_configs/zero3.json){cure}"
        )


def _distance(whole: nn.Module) -> float:
    """Return how far stages are from `whole`, relative to its hidden states."""
    depth = len(find_decoder(whole).layers)
    ids = torch.arange(1, 25).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    places = torch.arange(12).expand(2, 12)
    call = {"attention_mask": mask, "position_ids": places, "use_cache": False}
    truth = find_decoder(whole).decoder(input_ids=ids, **call)[0]
    hidden: Tensor = ids
    for part in slices(middle_cuts(depth), depth):
        stage = DecoderStage(copy.deepcopy(whole), part, chunk_tokens=64)
        hidden = stage(hidden, mask, places)
    real = mask.bool()
    return float((hidden - truth)[real].abs().max() / truth[real].abs().max())


def middle_cuts(depth: int) -> list[int]:
    """Return boundaries of up to four stages, among them such of one and of two layers."""
    return sorted({min(depth - 1, one) for one in (1, depth // 2, depth - 2) if one > 0})


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
            setattr(text, name, 64)
        elif name.endswith("_token_id"):
            setattr(text, name, None)
    text.num_hidden_layers = keep
    text.num_attention_heads, text.hidden_size, text.vocab_size = 2, 2 * head_dim, 64
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = 1 if shared else 2
    return tiny
