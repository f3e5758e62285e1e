"""How little a sublayer changes its input: the measure by which a static drop chooses layers.

Source: LLM-Drop, arXiv 2406.15786. Shapes: B documents, T tokens, D hidden.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.calibration.finite import require_finite
from megaskip.data import Batch
from megaskip.parallel.collectives import gather_from_ranks
from megaskip.parallel.engine import Engine


class UpdateSimilarity:
    """Adds up cos(X, X + update) over real tokens while it watches a model, by layer.

    The update is that of `target`: of the attention, of the MLP (whose X is what it is added to),
    or of the whole layer ("block").
    """

    def __init__(self, model: nn.Module, target: str, layers: Sequence[int]) -> None:
        """Watch the decoder layers `layers` of `model`."""
        self._decoder, self._target = find_decoder(model), target
        # Granite multiplies every update by a number of its own before it is added.
        config: Any = model.config
        self._scale = getattr(config, "residual_multiplier", None) or 1.0
        self._layers = layers
        self._mask: Tensor | None = None
        self._states: dict[str, Tensor] = {}
        self.sums = torch.zeros(len(self._decoder.layers), dtype=torch.float64)
        """By layer, over real tokens; 0 for layers that are not watched. Sums of ranks add up."""
        self.tokens = 0
        """Real tokens so far."""

    def set_batch(self, token_mask: Tensor | None) -> None:
        """Say which tokens of the next forward pass are real, bool [B, T]; None counts none."""
        self._mask = token_mask
        self.tokens += int(token_mask.sum()) if token_mask is not None else 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hold a context in which the model's forward passes are added up."""
        handles = [handle for index in self._layers for handle in self._watch(index)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, index: int) -> list[Any]:
        layer = self._decoder.layers[index]
        sites = find_sites(layer, self._decoder.model_type)

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._states = {"input": args[0] if args else kwargs["hidden_states"]}

        def note(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                self._states[name] = _tensor(output)

            return hook

        def end(_: nn.Module, __: Any, output: Any) -> None:
            self._count(index, self._states | {"output": _tensor(output)})

        attention = layer.get_submodule(sites.attention_update)
        return [
            layer.register_forward_pre_hook(begin, with_kwargs=True),
            attention.register_forward_hook(note("attn")),
            layer.get_submodule(sites.mlp_update).register_forward_hook(note("mlp")),
            layer.register_forward_hook(end),
        ]

    def _count(self, index: int, states: dict[str, Tensor]) -> None:
        if self._mask is None:
            return
        states = {name: tensor.float() for name, tensor in states.items()}
        before, after = states["input"], states["output"]
        if self._target == "attn":
            after = before + self._scale * states["attn"]
        elif self._target == "mlp":
            before = after - self._scale * states["mlp"]
        cosine = nn.functional.cosine_similarity(before, after, dim=-1)
        self.sums[index] += cosine[self._mask].double().sum().cpu()


def _tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@torch.no_grad()
def mean_similarity(engine: Engine, batches: Sequence[Batch | None]) -> dict[int, float]:
    """Return by routed layer the mean cosine of what its target reads and what comes of it, over
    the real tokens of all ranks' `batches`. High: it changes little, and is dropped first.
    Collective; without pipeline stages."""
    routers = engine.routers
    seen = UpdateSimilarity(engine.model, routers.config.target, routers.layers)
    with routers.disabled(), seen.watching():
        for batch in batches:
            seen.set_batch(batch.token_mask if batch is not None else None)
            for _ in engine.forwards([batch]):
                pass
    totals = torch.cat([seen.sums, seen.sums.new_tensor([seen.tokens])])
    total = torch.stack(gather_from_ranks(totals)).sum(0)
    require_finite(total, "how much the layers change what they read")
    *sums, tokens = total.tolist()
    return {layer: sums[layer] / max(tokens, 1.0) for layer in routers.layers}
