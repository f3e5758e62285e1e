"""A model for inference whose layers are spread over the stages of a pipeline."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from megaskip.arch import find_decoder
from megaskip.arch.part import connect, cut_to_part, verify_parts
from megaskip.arch.stage import Slice, slices
from megaskip.errors import ConfigError
from megaskip.parallel.loading.partition import balance, layer_costs
from megaskip.parallel.loading.source import ModelSource
from megaskip.parallel.loading.stage import load_stage
from megaskip.parallel.loading.whole import build_tiny, skeleton
from megaskip.parallel.p2p import P2PChannel
from megaskip.parallel.topology import Topology
from megaskip.routing import Routers


class StagedModel:
    """What one rank holds of a model, and what ties it to its neighbours."""

    def __init__(self, model: Any, shape: Any, part: Slice, topology: Topology) -> None:
        """`shape` is the whole model without weights."""
        self.model = model
        self.shape = shape
        self.part = part
        self.links = StageLinks(topology)

    def connect(self, routers: Routers | None) -> None:
        """Tie this part to the others; routers are attached before. From then on every stage of a
        replica has to call the model, with the same inputs."""
        connect(self.model, self.part, routers, self.links)


class StageLinks:
    """The stages of one replica, as ranks (megaskip.arch.part.Neighbours)."""

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
    """Return this rank's part, unconnected; the layers' weights are balanced over the stages.

    Every rank calls it by itself and reads its own tensors. Raises UnsupportedModelError for a
    family whose parts do not compute what the whole does.
    """
    verify_parts(source.hf_config, functools.partial(build_tiny, source))
    shape = skeleton(source)
    depth = len(find_decoder(shape).layers)
    if topology.num_stages > depth:
        raise ConfigError(f"--pipeline_stages {topology.num_stages}: the model has {depth} layers")
    costs = layer_costs(shape, depth, recompute=False)
    part = slices(balance(costs, topology.num_stages), depth)[topology.stage]

    def cut(model: nn.Module) -> nn.Module:
        cut_to_part(model, part)
        return model

    model: Any = load_stage(source, part, cut, topology.device)
    model.requires_grad_(False)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return StagedModel(model, shape, part, topology)
