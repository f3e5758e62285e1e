"""A model for inference from any folder that megaskip writes: whole on a device, sharded, or in
stages.

Knows folders and weights, not what the model is used for.
"""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from megaskip.arch import attach_routers
from megaskip.checkpoint import load_routers
from megaskip.checkpoint.adapters import FOLDER, has_adapter, load_adapter
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import is_hub_id
from megaskip.checkpoint.routers import (
    CONFIG,
    is_unfinished_run,
    read_router_config,
    why_no_routers,
)
from megaskip.checkpoint.tensors import read_tensors
from megaskip.config import ModelConfig, ParallelConfig, RouterConfig
from megaskip.config.run import DEMO
from megaskip.errors import CheckpointError, ConfigError, first_line
from megaskip.inference.dropped import DroppedForCausalLM
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.hf import MODEL_TYPE, MegaskipConfig
from megaskip.inference.routed import MegaskipForCausalLM
from megaskip.inference.static_decode import let_generate_record
from megaskip.parallel.agree import on_every_rank, on_first_rank
from megaskip.parallel.build import shard_backbone
from megaskip.parallel.loading.loaded_values import require_loaded
from megaskip.parallel.loading.packed_values import require_loaded_packed
from megaskip.parallel.loading.source import (
    CONFIG_ERRORS,
    ModelSource,
    choose_arithmetic,
    find_model_folder,
    resolve_source,
    source_in,
)
from megaskip.parallel.loading.staged_model import StagedModel, load_staged
from megaskip.parallel.loading.weight_check import check_weights, with_checked_weights
from megaskip.parallel.loading.whole import load_whole, read_onto
from megaskip.parallel.topology import Topology
from megaskip.routing import PREFIX, Routers


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceModel:
    """A frozen model in evaluation mode, with its routers if it has any."""

    model: Any
    """The HF model; under ZeRO-3 its parameters are partitioned, in stages it holds some layers."""
    routers: Routers | None
    """None for a dense model, or one whose sublayers were dropped for good."""
    folder: Path
    """Where its tokenizer is."""
    description: str
    staged: StagedModel | None = None
    """What ties the model to its other stages, if it has any."""
    shape: Any = None
    """In stages: the whole model without weights. Else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a model's weights go: whole to a device, or spread over ranks."""

    topology: Topology
    ds_content: dict[str, Any] | None = None
    """The content of a DeepSpeed JSON: the weights are partitioned by ZeRO-3."""

    @classmethod
    def on(cls, device: torch.device) -> "Placement":
        """Return the placement of a process that is alone."""
        return cls(topology=Topology(rank=0, world_size=1, local_rank=0, device=device))

    @property
    def is_spread(self) -> bool:
        """Return whether a rank holds only some of the weights."""
        return self.ds_content is not None or self.topology.num_stages > 1

    def __str__(self) -> str:
        """Return the words for it."""
        if self.topology.num_stages > 1:
            stages, replicas = self.topology.num_stages, self.topology.num_replicas
            return f"{stages} stages x {replicas} replica(s)"
        return "replicas" if self.ds_content is None else "ZeRO-3"


def load_for_inference(
    name: str, placement: Placement, *, dtype: str = "auto", base: str | None = None
) -> InferenceModel:
    """Return the model of an exported, a run, a router or a plain HF folder.

    Collective: every rank of the placement's topology calls it. Raises ConfigError for a folder
    that is none of these, and CheckpointError for weights that `check_weights` refuses.
    """
    folder, backbone = Path(name), ModelConfig(dtype=dtype)
    routers = folder if (folder / CONFIG).is_file() else folder / "routers"
    if (routers / CONFIG).is_file() and not (folder / "config.json").is_file():
        return _with_router_folder(routers, base, backbone, placement)
    if name != DEMO and not is_hub_id(name) and not (folder / "config.json").is_file():
        raise ConfigError(f"--model {folder}: {_why_no_model(folder)}")
    backbone = dataclasses.replace(backbone, model=name)
    folder = find_model_folder(backbone)
    content = read_json(folder / "config.json")
    if str(content.get("model_type")).startswith(MODEL_TYPE):
        return _exported(folder, content, backbone, placement)
    return _Backbone(resolve_source(backbone, folder), placement).dense(f"{name}, dense")


def _why_no_model(folder: Path) -> str:
    if folder.is_dir() and not is_unfinished_run(folder):
        return f"found neither config.json (exported) nor {CONFIG} (routers) there"
    return why_no_routers(folder)


def _with_router_folder(
    routers: Path, base: str | None, backbone: ModelConfig, placement: Placement
) -> InferenceModel:
    config, _, described = read_router_config(routers)
    named = base or (described.name if described is not None else "")
    if not named:
        raise ConfigError(f"--model {routers} does not name its base model; give --base")
    revision = described.revision if described is not None and base is None else None
    backbone = dataclasses.replace(backbone, model=named, revision=revision)
    source = with_checked_weights(resolve_source(backbone), placement.topology)
    if described is not None:
        described.require(source.describe(), "the router folder")
    loaded = _Backbone(source, placement)
    # Beside weights that are spread, on those that are not.
    attached = load_routers(loaded.model, routers, register=not placement.is_spread)
    return loaded.routed(attached, "keep", f"{routers} on {named}", config)


def _exported(
    folder: Path, content: dict[str, Any], backbone: ModelConfig, placement: Placement
) -> InferenceModel:
    routing = content.get("routing")
    if not placement.is_spread:
        return _exported_whole(folder, routing, backbone, placement.topology)
    if routing is None:
        raise ConfigError(
            f"--model {folder} has sublayers dropped for good, which cannot be spread over ranks "
            "yet (--ds_config, --pipeline_stages); evaluate it without"
        )
    # The base's tensors have the base's names, so its own class reads them from this folder.
    foreign = ("routing", "dropped", "base_model_type", "auto_map", "model_type", "architectures")
    own = {name: value for name, value in content.items() if name not in foreign}
    try:
        hf_config = CONFIG_MAPPING[content["base_model_type"]].from_dict(own)
        config = RouterConfig.from_dict(routing)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"--model {folder}: {first_line(error)}") from None
    loaded = _Backbone(source_in(folder, hf_config, backbone), placement)
    attached = attach_routers(loaded.model, config, register=False)
    stored = read_tensors(folder / f"{PREFIX}.safetensors")
    attached.load_state_dict({n.removeprefix(f"{PREFIX}."): t for n, t in stored.items()})
    attached.take_adapters(load_adapter(loaded.model, folder, device=placement.topology.device))
    return loaded.routed(attached, routing.get("kv", "keep"), str(folder), config)


def _exported_whole(
    folder: Path, routing: dict[str, Any] | None, backbone: ModelConfig, topology: Topology
) -> InferenceModel:
    kind = None if backbone.dtype == "auto" else getattr(torch, backbone.dtype)
    # The package's own code, the same that the folder carries.
    made: Any = DroppedForCausalLM if routing is None else MegaskipForCausalLM
    try:
        hf_config = MegaskipConfig.from_pretrained(folder)
        source = source_in(folder, hf_config, backbone)
        with torch.device("meta"):
            shape = made._from_config(copy.deepcopy(source.hf_config))
        plan = on_first_rank(topology, lambda: check_weights(source, shape))
        with_adapter = routing is not None and _require_adapter(folder, hf_config)
        options = {"config": hf_config, "dtype": kind or "auto", **read_onto(topology.device)}
        model = made.from_pretrained(folder, **options)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"--model {folder}: {first_line(error)}") from None
    choose_arithmetic(model.dtype, topology.device)
    model.to(topology.device).eval().requires_grad_(False)
    on_every_rank(topology, lambda: require_loaded(folder, plan, model))
    on_every_rank(topology, lambda: require_loaded_packed(folder, plan, model))
    if with_adapter:
        load_adapter(model, folder, device=topology.device)
    routers = model.get_submodule(PREFIX) if routing is not None else None
    what = "sublayers dropped" if routing is None else routing["granularity"]
    return InferenceModel(
        model=model, routers=routers, folder=folder, description=f"{folder}, {what}"
    )


def _require_adapter(folder: Path, hf_config: Any) -> bool:
    """Return whether an exported folder has an adapter, and let its config ask for none: it is
    loaded here. Raises CheckpointError where it should have one."""
    named = hf_config.routing.get("adapter")
    if named == FOLDER and not has_adapter(folder):
        raise CheckpointError(
            f"--model {folder} was exported with {FOLDER}/, which is not there; copy the whole "
            "folder again"
        )
    hf_config.routing = {k: v for k, v in hf_config.routing.items() if k != "adapter"}
    return bool(named == FOLDER)


class _Backbone:
    """A base model, placed; then with routers or without."""

    def __init__(self, source: ModelSource, placement: Placement) -> None:
        self._folder, self._device = source.folder, placement.topology.device
        self._staged: StagedModel | None = None
        self._is_spread = placement.is_spread
        self.model: Any
        choose_arithmetic(source.dtype, self._device)
        topology = placement.topology
        source = with_checked_weights(source, topology)
        if topology.num_stages > 1:
            self._staged = load_staged(source, topology)
            self.model = self._staged.model
        elif placement.ds_content is not None:
            chunk_tokens = ParallelConfig().loss_chunk_tokens
            loss, _ = shard_backbone(source, placement.ds_content, chunk_tokens)
            self.model = loss.model.eval()
        else:
            model = on_every_rank(topology, lambda: load_whole(source, self._device))
            self.model = model.eval().requires_grad_(False)

    def dense(self, description: str) -> InferenceModel:
        """Return the model without routers."""
        return self._finished(None, description)

    def routed(
        self, routers: Routers, kv: str, description: str, config: RouterConfig
    ) -> InferenceModel:
        """Return the model with the routers that were attached to it."""
        routers.to(self._device)
        routers.state.executor = InferenceExecutor(unit=config.unit, kv=kv)
        if not self._is_spread:
            let_generate_record(self.model)
        return self._finished(routers, f"{description}, {config.granularity}")

    def _finished(self, routers: Routers | None, description: str) -> InferenceModel:
        if self._staged is not None:
            self._staged.connect(routers)
        return InferenceModel(
            model=self.model,
            routers=routers,
            folder=self._folder,
            description=description,
            staged=self._staged,
            shape=None if self._staged is None else self._staged.shape,
        )
