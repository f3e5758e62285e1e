"""A causal LM of which this process holds some layers: for inference, with generate() and cache.

Unlike a training stage, which is a shorter model, this is the HF model itself with all its places.
Where a layer is held elsewhere stands one that passes its input on and stores keys of width one, so
that masks, positions and caches are as long as the text. Knows modules, not ranks.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.stage import Slice, middle_cuts, slices, verify_stages
from megaskip.routing import Routers
from megaskip.routing.handover import carried_keep, receive_keep


class Neighbours(Protocol):
    """The way to the processes that hold the other parts."""

    shares_logits: bool
    """Whether the last part's logits are wanted by all, as in generation; scoring needs them
    there."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send to the part above."""
        ...

    def receive(self, tensors: list[Tensor]) -> list[Tensor]:
        """Fill tensors with what the part below sent, and return them."""
        ...

    def spread(self, logits: Tensor) -> None:
        """Send logits to all other parts; the last part calls it."""
        ...

    def take(self, logits: Tensor) -> Tensor:
        """Fill `logits` with what the last part spreads, and return them."""
        ...


class LayerElsewhere(nn.Module):
    """The place of a layer that another process holds."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self._index = index
        # What a base model asks of its layers before it runs them, such as the kind of mask.
        plain = {k: v for k, v in vars(layer).items() if isinstance(v, (str, int, float))}
        self.__dict__.update({k: v for k, v in plain.items() if not k.startswith("_")})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `hidden_states` [B, T, D]; the cache, if any, counts the tokens."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            # Transformers takes keys without elements for no keys.
            keys = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(keys, keys[..., :0], self._index)
        return hidden_states


class _EmbeddingElsewhere(nn.Module):
    """Stands for the embedding where what enters comes from another process."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._hidden_size, self._dtype = hidden_size, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return zeros [B, T, D]."""
        shape = (*input_ids.shape, self._hidden_size)
        return torch.zeros(shape, dtype=self._dtype, device=input_ids.device)


class _HeadElsewhere(nn.Module):
    """Stands for the output embedding: returns the last part's logits where they are shared."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self.neighbours: Neighbours | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return logits [B, T, V] when they are shared, else [B, T, 0]."""
        neighbours, shape = self.neighbours, hidden_states.shape[:-1]
        if neighbours is None or not neighbours.shares_logits:
            return hidden_states.new_empty(*shape, 0)
        return neighbours.take(hidden_states.new_empty(*shape, self._vocab_size))


def cut_to_part(model: Any, part: Slice) -> None:
    """Leave a causal LM what one process holds; `connect` then ties it to the others.

    Attached routers come between the two: unconnected, the model runs by itself.
    """
    decoder_parts = find_decoder(model)
    decoder: Any = decoder_parts.decoder
    dtype = next(model.parameters()).dtype
    for index, layer in enumerate(decoder_parts.layers):
        if not part.first <= index < part.stop:
            decoder_parts.layers[index] = LayerElsewhere(layer, index)
    if not part.is_first:
        decoder.set_input_embeddings(_EmbeddingElsewhere(decoder_parts.hidden_size, dtype))
    if not part.is_last:
        decoder.norm = nn.Identity()
        config = model.config.get_text_config(decoder=True)
        model.set_output_embeddings(_HeadElsewhere(config.vocab_size))
    # Input and output embedding are one parameter already, or one of them is elsewhere.
    model._tied_weights_keys = None


def connect(model: Any, part: Slice, routers: Routers | None, neighbours: Neighbours) -> None:
    """Let hidden states, and what routed layers decided, come in below this part and go out
    above."""
    decoder_parts = find_decoder(model)
    below = 0 if routers is None else sum(layer < part.first for layer in routers.layers)

    def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden_states = args[0] if args else kwargs.pop("hidden_states")
        memory = [torch.empty_like(hidden_states, memory_format=torch.contiguous_format)]
        pooling = routers.state.pooling if routers is not None and below else None
        if pooling is not None:
            shape = (below, *pooling.unit_mask.shape)
            memory.append(torch.empty(shape, dtype=torch.float32, device=hidden_states.device))
        hidden_states, *keep = neighbours.receive(memory)
        if keep and routers is not None:
            receive_keep(routers, keep[0])
        return (hidden_states, *args[1:]), kwargs

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        leaving = [output[0] if isinstance(output, tuple) else output]
        # Decisions of the cache, in decode, are in the cache of every part.
        if routers is not None and routers.state.pooling is not None:
            keep = carried_keep(routers)
            leaving += [] if keep is None else [keep]
        neighbours.send(leaving)

    def spread(module: nn.Module, args: Any, logits: Tensor) -> None:
        if neighbours.shares_logits:
            neighbours.spread(logits)

    if not part.is_first:
        decoder_parts.layers[part.first].register_forward_pre_hook(enter, with_kwargs=True)
    if not part.is_last:
        decoder_parts.layers[part.stop - 1].register_forward_hook(leave)
    head = model.get_output_embeddings()
    if part.is_last:
        head.register_forward_hook(spread)
    else:
        head.neighbours = neighbours


# -- proof


def verify_parts(config: Any, build: Callable[[Any], nn.Module]) -> None:
    """Raise UnsupportedModelError unless parts of a tiny random copy give the logits of the whole.

    Of a prompt, and of a token after it with the cache. Arguments as in `verify_stages`.
    """
    verify_stages(config, build, distance=_distance, what="logits")


class _Queue:
    """Neighbours in one process: the parts run one after the other."""

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


def _distance(whole: nn.Module) -> float:
    """Return how far the parts' logits are from `whole`'s, relative to them."""
    depth = len(find_decoder(whole).layers)
    queue, parts = _Queue(), []
    for part in slices(middle_cuts(depth), depth):
        model = copy.deepcopy(whole)
        cut_to_part(model, part)
        connect(model, part, None, queue)
        parts.append(model)
    ids = torch.arange(1, 27).reshape(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    truth, found = _two_calls([whole], ids, mask), _two_calls(parts, ids, mask)
    return float((found - truth).abs().max() / truth.abs().max())


def _two_calls(parts: Sequence[Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Return the logits [2, B, V] of a prompt's last token and of the token after it."""
    caches: list[Any] = [None] * len(parts)
    logits = []
    for tokens, seen in ((ids[:, :-1], mask[:, :-1]), (ids[:, -1:], mask)):
        for index, model in enumerate(parts):
            call = {"attention_mask": seen, "past_key_values": caches[index], "use_cache": True}
            out = model(input_ids=tokens, **call)
            caches[index] = out.past_key_values
        logits.append(out.logits[:, -1])
    return torch.stack(logits)
