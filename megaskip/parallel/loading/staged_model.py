"""A model for inference whose layers are spread over the stages of a pipeline."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from megaskip.arch.neighbours import connect
from megaskip.arch.stage import LayerRange, cut
from megaskip.arch.stage_proof import verify_stages
from megaskip.parallel.agree import on_every_rank
from megaskip.parallel.loading.skeleton import build_tiny, skeleton
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stage_cuts import cuts_for_inference
from megaskip.parallel.loading.stage_weights import load_stage
from megaskip.parallel.p2p import P2PChannel
from megaskip.parallel.topology import Topology
from megaskip.routing import Routers


class StagedModel:
    """What one rank holds of a model, and what ties it to its neighbours."""

    def __init__(
        self,
        model: Any,
        shape: Any,
        layers: LayerRange,
        topology: Topology,
        *,
        needs_mask: bool = True,
    ) -> None:
        """`shape` is the whole model without weights; `needs_mask` as in TaskLoss."""
        self.model = model
        self.needs_mask = needs_mask
        self.shape = shape
        self.layer_range = layers
        self.links = StageLinks(topology)

    def connect(self, routers: Routers | None) -> None:
        """Tie this stage to the others of its replica; routers are attached before. From then on
        every stage has to call the model, with the same inputs."""
        connect(self.model, self.layer_range, routers, self.links)


class StageLinks:
    """The stages of one replica, as ranks (megaskip.arch.neighbours.Neighbours)."""

    def __init__(self, topology: Topology) -> None:
        self.shares_logits = False
        self._previous, self._next = P2PChannel(topology.rank - 1), P2PChannel(topology.rank + 1)
        first = topology.rank - topology.stage
        self._others = [P2PChannel(first + stage) for stage in range(topology.num_stages - 1)]
        self._last = P2PChannel(first + topology.num_stages - 1)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Start sending to the stage above."""
        self._next.send(tensors)

    def receive(self, tensors: list[Tensor]) -> list[Tensor]:
        """Fill tensors with what the stage below sent, and return them."""
        return self._previous.receive(tensors)

    def spread(self, logits: Tensor) -> None:
        """Send logits to all other stages; the last stage calls it."""
        for other in self._others:
            other.send([logits])

    def take(self, logits: Tensor) -> Tensor:
        """Fill `logits` with what the last stage spreads, and return them."""
        return self._last.receive([logits])[0]


def load_staged(source: ModelSource, topology: Topology) -> StagedModel:
    """Return this rank's stage, unconnected; the layers' weights are balanced over the stages.

    Collective; every rank reads its own tensors. Raises UnsupportedModelError for a family whose
    stages do not compute what the whole does, and what `load_stage` does.
    """
    masked = verify_stages(source.hf_config, functools.partial(build_tiny, source), generates=True)
    shape = skeleton(source)
    layers = cuts_for_inference(shape, topology.num_stages)[topology.stage]

    def take_apart(model: nn.Module) -> nn.Module:
        cut(model, layers)
        return model

    def load() -> Any:
        return load_stage(source, layers, take_apart, topology.device)

    model = on_every_rank(topology, load)
    model.requires_grad_(False)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return StagedModel(model, shape, layers, topology, needs_mask=masked)
