"""How little a sublayer changes what it reads: what a static drop goes by.

Source: LLM-Drop, arXiv 2406.15786. Shapes: B documents, T tokens, D hidden.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.data import Batch


class UpdateSimilarity:
    """Adds up cos(X, X + update) over real tokens while it watches a model, by layer.

    The update is that of `target`: of the attention, of the MLP (whose X is what it is added to),
    or of the whole layer ("block").
    """

    def __init__(
        self, model: nn.Module, target: str = "attn", layers: Sequence[int] | None = None
    ) -> None:
        """Watch `layers` of `model`, all without them."""
        self._decoder_parts, self._target = find_decoder(model), target
        # Granite multiplies every update by a number of its own before it is added.
        config: Any = model.config
        self._scale = getattr(config, "residual_multiplier", None) or 1.0
        depth = len(self._decoder_parts.layers)
        self._layers = range(depth) if layers is None else layers
        self._mask: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self.sums = torch.zeros(depth, dtype=torch.float64)
        """By layer, 0 where nobody looks; those of ranks add up, as `tokens` do."""
        self.tokens = 0

    def set_batch(self, token_mask: Tensor | None) -> None:
        """Say which tokens of the next forward pass are real, bool [B, T]; None counts none."""
        self._mask = token_mask
        self.tokens += int(token_mask.sum()) if token_mask is not None else 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hold a context in which the model's forward passes count."""
        handles = [h for index in self._layers for h in self._watch(index)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, index: int) -> list[Any]:
        layer = self._decoder_parts.layers[index]
        sites = find_sites(layer, self._decoder_parts.model_type)

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._parts = {"input": args[0] if args else kwargs["hidden_states"]}

        def note(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self._parts[name] = _tensor(output)

            return hook

        def end(_: nn.Module, __: Any, output: Any) -> None:
            self._count(index, self._parts | {"output": _tensor(output)})

        attention = layer.get_submodule(sites.attention_update)
        return [
            layer.register_forward_pre_hook(begin, with_kwargs=True),
            attention.register_forward_hook(note("attn")),
            layer.get_submodule(sites.mlp_update).register_forward_hook(note("mlp")),
            layer.register_forward_hook(end),
        ]

    def _count(self, index: int, parts: dict[str, Tensor]) -> None:
        if self._mask is None:
            return
        parts = {name: one.float() for name, one in parts.items()}
        before, after = parts["input"], parts["output"]
        if self._target == "attn":
            after = before + self._scale * parts["attn"]
        elif self._target == "mlp":
            before = after - self._scale * parts["mlp"]
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        self.sums[index] += cosine[self._mask].double().sum().cpu()


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def update_similarity(model: nn.Module, batches: Iterable[Batch]) -> dict[int, float]:
    """Return for each layer the mean cos(X, X + Attn(LN(X))) over the real tokens of `batches`.

    High: the attention changes little, and is dropped first.
    """
    seen = UpdateSimilarity(model)
    with seen.watching():
        for batch in batches:
            seen.set_batch(batch.token_mask)
            find_decoder(model).decoder(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
    return dict(enumerate((seen.sums / max(seen.tokens, 1)).tolist()))
