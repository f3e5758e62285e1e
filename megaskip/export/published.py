"""Published Router-Tuning and MindSkip routers, as their authors' code saves them, to a router
folder.

Knows their names and fields only; takes none of their modelling files.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaskip.arch.trainable import describe_layers
from megaskip.checkpoint.base import BaseModel
from megaskip.checkpoint.routers import save_routers
from megaskip.config import RouterConfig
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.published_config import PublishedConfig
from megaskip.export.weight_files import read_tensors_named
from megaskip.routing import RouterSet

_ROUTER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:(self_attn|mlp)\.)?router\.(?:weight|bias)")
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What published files hold, and how it was read."""

    folder: Path
    """The router folder that was written."""
    config: RouterConfig
    layers: tuple[int, ...]
    hidden_size: int
    example: str
    """The name of the first router's weight in the source."""
    dtypes: tuple[str, ...]
    ignored: int
    """Tensors of the source that are no routers."""
    base: BaseModel | None
    assumptions: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as rows of (name, value)."""
        config, base = self.config, self.base
        described = "not recorded"
        if base is not None:
            described = f"{base.model_type}, {base.num_layers} layers, hidden {base.hidden_size}"
        assumed = self.assumptions or ("nothing",)
        return [
            ("routers", f"{len(self.layers)}, in layers {describe_layers(self.layers)}"),
            ("stored as", f"{self.example} [1, {self.hidden_size}] and so on"),
            ("dtype", f"{', '.join(self.dtypes)}; written as float32"),
            ("granularity", config.granularity),
            ("threshold", config.describe_threshold()),
            ("capacity", f"{config.capacity:g}, penalty weight {config.penalty_weight:g}"),
            ("semantics", f"pool {config.pool}, budget {config.budget}, as published"),
            ("base model", described),
            ("ignored keys", f"{self.ignored} that are no routers"),
            *(("" if i else "assumptions", text) for i, text in enumerate(assumed)),
            ("router folder", str(self.folder)),
        ]


def import_published(
    source: Path, output: Path, *, config: Path | None = None, granularity: str | None = None
) -> ImportReport:
    """Write the published routers of `source`, a folder or a weight file, as router folder
    `output`.

    `config` is their config.json when it does not lie beside them; `granularity` says what they
    skip when it does not. Raises CheckpointError or ConfigError when they are incomplete,
    contradict their config.json, or cannot be represented; nothing is written then.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output {output} exists and is not empty; name a new folder")
    if not source.exists():
        raise CheckpointError(f"--source {source}: no such file or folder; download it first")
    names, tensors = read_tensors_named(source, _ROUTER)
    stored = _find_routers(source, names, tensors)
    beside = source if source.is_dir() else source.parent
    recorded = PublishedConfig(config or beside / "config.json")
    hidden_size = _check_fit(source, stored, recorded)
    weights = {layer: router.checked_weight(hidden_size) for layer, router in stored.items()}
    routers = RouterSet(_settle(recorded, stored, granularity), tuple(weights), hidden_size)
    with torch.no_grad():
        for layer, weight in weights.items():
            routers.router(layer).weight.copy_(weight)
    base = recorded.base_model()
    save_routers(output, routers, base=base)
    return ImportReport(
        folder=output,
        config=routers.config,
        layers=routers.layers,
        hidden_size=hidden_size,
        example=f"{next(iter(stored.values())).name}.weight",
        dtypes=tuple(sorted({_dtype_name(router) for router in stored.values()})),
        ignored=len(names) - sum(1 + (router.bias is not None) for router in stored.values()),
        base=base,
        assumptions=(*_notes(stored, weights), *recorded.notes),
    )


# -- routers among the tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredRouter:
    """A router as it is stored."""

    name: str
    file: Path
    sublayer: str | None
    """The sublayer that it lies in, when it is not the layer itself."""
    weight: Tensor
    bias: Tensor | None

    def checked_weight(self, hidden_size: int) -> Tensor:
        """Return the weight as float32; raises CheckpointError when a router folder cannot hold
        it."""
        weight, bias, name = self.weight, self.bias, f"{self.file}: {self.name}"
        if tuple(weight.shape) != (1, hidden_size):
            raise CheckpointError(
                f"{name}.weight has shape {tuple(weight.shape)}, expected (1, {hidden_size}): one "
                "linear score for the hidden size of the model; is it another model's config.json?"
            )
        if not weight.is_floating_point():
            raise CheckpointError(f"{name}.weight is {weight.dtype}, expected floating point")
        if not bool(torch.isfinite(weight.float()).all()):
            raise CheckpointError(f"{name}.weight has values that are not finite; it is damaged")
        if bias is not None and bool((bias != 0).any()):
            raise CheckpointError(
                f"{name}.bias is not zero ({float(bias.flatten()[0]):g}): published routers have "
                "no bias and neither have megaskip's, so it would decide differently; train "
                "routers without one"
            )
        return weight.float()


def _find_routers(
    source: Path, names: list[str], tensors: Mapping[str, tuple[Path, Tensor]]
) -> dict[int, _StoredRouter]:
    """Return the routers by layer, ascending; raises CheckpointError when there are none."""
    stored: dict[int, _StoredRouter] = {}
    for module in sorted({name.rpartition(".")[0] for name in tensors}):
        match = _ROUTER.fullmatch(f"{module}.weight")
        assert match is not None, f"{module} was read but is no router"
        if f"{module}.weight" not in tensors:
            raise CheckpointError(f"{source}: {module}.bias has no {module}.weight beside it")
        file, weight = tensors[f"{module}.weight"]
        # Mixture-of-experts models own routers of this name, one row for each expert.
        if match[2] == "mlp" and weight.dim() == 2 and weight.shape[0] > 1:
            continue
        layer, (_, bias) = int(match[1]), tensors.get(f"{module}.bias", (file, None))
        if layer in stored:
            raise CheckpointError(
                f"{source}: layer {layer} has two routers, {stored[layer].name} and {module}; a "
                "router folder holds one for each layer"
            )
        stored[layer] = _StoredRouter(
            name=module, file=file, sublayer=match[2], weight=weight, bias=bias
        )
    if not stored:
        raise CheckpointError(_no_routers(source, names))
    return dict(sorted(stored.items()))


def _no_routers(source: Path, names: list[str]) -> str:
    shown = sorted(names, key=lambda name: ("router" not in name, name))[:_SHOWN]
    listed = f"such as {', '.join(shown)}" if shown else "none"
    return (
        f"{source}: no published routers among its {len(names)} tensors, expected names such as "
        f"model.layers.16.router.weight of shape [1, hidden]; found {listed}. Give the folder or "
        "file that training has saved with --source"
    )


def _check_fit(source: Path, stored: Mapping[int, _StoredRouter], recorded: PublishedConfig) -> int:
    """Return the hidden size; raises CheckpointError when routers and config.json contradict each
    other."""
    num_layers, layers = recorded.integer("num_hidden_layers"), set(stored)
    if num_layers is not None and max(layers) >= num_layers:
        raise CheckpointError(
            f"{source}: a router for layer {max(layers)}, but {recorded.file} has layers 0 to "
            f"{num_layers - 1} (num_hidden_layers {num_layers}); pass the right one with --config"
        )
    flagged = recorded.flagged(num_layers)
    if flagged is not None and flagged != layers:
        missing, extra = describe_layers(flagged - layers), describe_layers(layers - flagged)
        raise CheckpointError(
            f"{source}: routers for layers {describe_layers(layers)}, but {recorded.file} flags "
            f"{describe_layers(flagged) or 'none'}: missing {missing or 'none'}, unexpected "
            f"{extra or 'none'}; complete the files, or pass the right one with --config"
        )
    return recorded.integer("hidden_size") or next(iter(stored.values())).weight.numel()


def _notes(stored: Mapping[int, _StoredRouter], weights: Mapping[int, Tensor]) -> Iterator[str]:
    """Yield what is worth knowing about the weights."""
    biased = [layer for layer, router in stored.items() if router.bias is not None]
    if biased:
        yield f"biases of layers {describe_layers(biased)} are zero and were dropped"
    zero = [layer for layer, weight in weights.items() if not weight.any()]
    if zero:
        yield f"routers of layers {describe_layers(zero)} are all zeros, as before training"
    if any(router.weight.dtype == torch.bfloat16 for router in stored.values()):
        # sigmoid(z) rounds to 0.5 in bfloat16 for z above -2**-8.
        yield (
            "decisions are taken in float32; published code that takes them in bfloat16 also "
            "keeps units with a logit up to 0.004 below that of a threshold of 0.5"
        )


def _dtype_name(router: _StoredRouter) -> str:
    return str(router.weight.dtype).removeprefix("torch.")


def _settle(
    recorded: PublishedConfig, stored: Mapping[int, _StoredRouter], granularity: str | None
) -> RouterConfig:
    """Return the configuration of the routers, with the published pool and budget."""
    chosen = recorded.granularity(granularity)
    for router in stored.values():
        if router.sublayer is not None and chosen.startswith(
            {"self_attn": "mlp", "mlp": "attn"}[router.sublayer]
        ):
            raise CheckpointError(
                f"{router.file}: {router.name} lies in {router.sublayer}, but the granularity is "
                f"{chosen}; say what it skips with --granularity"
            )
    try:
        return RouterConfig(
            granularity=chosen,
            layers=tuple(stored),
            capacity=recorded.capacity(tuple(stored)),
            threshold=recorded.threshold(),
            pool="all",
            budget="layer",
            penalty_weight=recorded.penalty_weight(),
        )
    except ConfigError as error:
        raise CheckpointError(f"{recorded.file}: {error}") from None
