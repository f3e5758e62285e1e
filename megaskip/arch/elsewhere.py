"""What stands in the place of a layer that does not run here, so that layer numbers, masks and
caches stay those of the whole model. Knows modules, not ranks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class LayerElsewhere(nn.Module):
    """The place of a layer that another process holds, or that is left out."""

    pass_on: Callable[[Tensor], Tensor] | None = None
    """Returns what goes on in the place of the hidden states [B, T, D] that it is given; set where
    a boundary between stages is."""

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self._index = index
        # What a base model asks of its layers before it runs them, such as the kind of mask.
        plain = {k: v for k, v in vars(layer).items() if isinstance(v, (str, int, float))}
        self.__dict__.update({k: v for k, v in plain.items() if not k.startswith("_")})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `hidden_states` [B, T, D], or what `pass_on` makes of them; the cache, if any,
        counts the tokens."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            batch, tokens = hidden_states.shape[:2]
            # Transformers takes keys without elements for no keys.
            keys = hidden_states.new_zeros(batch, 1, tokens, 1)
            cache.update(keys, keys[..., :0], self._index)
        return hidden_states if self.pass_on is None else self.pass_on(hidden_states)


def run_from(decoder: Any, first: int, hidden_states: Tensor, **call: Any) -> Tensor:
    """Return what a base model makes of `hidden_states` [B, T, D] in front of layer `first`, after
    its final norm; the layers below are elsewhere. `call` is what it is called with besides."""
    # They enter above the last layer that is elsewhere: a base model may scale what it takes for
    # embeddings (granite does).
    below = decoder.layers[first - 1]
    below.pass_on = lambda embedded: hidden_states
    try:
        output: Tensor = decoder(inputs_embeds=hidden_states, **call)[0]
        return output
    finally:
        below.pass_on = None
