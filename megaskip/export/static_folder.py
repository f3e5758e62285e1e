"""A model's folder without the sublayers that are dropped for good, for servers that cannot route.

What the routers learnt about single inputs is lost; what is left is a smaller model for all, with
compensations in the place of what is gone, if there are any.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.checkpoint.atomic import new_folder, read_json, write_json, write_tensors
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import save_routers
from megaskip.checkpoint.weight_index import SINGLE
from megaskip.config import ModelConfig, RouterConfig
from megaskip.config.commands.export_static import FORMATS
from megaskip.config.paths import require_new
from megaskip.errors import ConfigError, UnsupportedModelError
from megaskip.export.base_weights import RENAMED_SINGLE, put_base_weights, require_safetensors
from megaskip.export.bundle import CODE, bundled_code
from megaskip.export.card import use_text, write_card
from megaskip.export.decilm import NORMS, decilm_config, require_decilm, write_decilm_code
from megaskip.export.folder import (
    Exported,
    base_name,
    own_config,
    put_rest,
    size_of,
)
from megaskip.export.merge import merge_adapter, merged_files
from megaskip.export.shards import names_of_dropped, stack_of_layers
from megaskip.export.static import WORDS, describe_dropped
from megaskip.export.static_maps import SHARD, StaticMaps, norms_behind, stored_maps
from megaskip.export.verify import Verified, verify_folder
from megaskip.parallel.loading.skeleton import skeleton
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.routing import RouterSet
from megaskip.routing.adapters import AdapterSet

_SUMMARY = (
    "A model without some of its sublayers, chosen with routers (Router-Tuning, arXiv 2410.13184)."
)


NO_MAPS_IN_DECILM = (
    "--format decilm cannot hold compensations: its one field for a map in the place of a "
    "sublayer, replace_with_linear, stands for a full matrix of hidden size x hidden size. Use "
    "--format hf, or leave them out with --without_compensation, which measures what that costs"
)


@dataclass(kw_only=True)
class StaticExport(Exported):
    """What a static export wrote, and what it left out."""

    removed: int = 0
    """Bytes of the base's tensors that are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticBase:
    """A base model that can be exported without some of its sublayers, in the form asked for."""

    source: ModelSource
    form: str
    """hf for transformers, decilm for servers."""
    content: Mapping[str, Any]
    """Its config.json as it is written."""
    weight_map: Mapping[str, str]
    """File of each stored tensor."""


def require_exportable(base: Path, output: Path, form: str) -> StaticBase:
    """Return the base model in a folder, once it is known that `form`, hf or decilm, can express
    it.

    What can be refused before anything is measured or loaded is refused here, with CheckpointError,
    ConfigError or UnsupportedModelError.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form!r} is not one of {', '.join(FORMATS)}")
    require_new(output)
    content = read_json(base / "config.json")
    if "auto_map" in content:
        raise ConfigError(
            f"--base {base} brings modelling code of its own, which an exported folder cannot "
            "carry along"
        )
    source = resolve_source(ModelConfig(model=str(base)))
    source = dataclasses.replace(source, weights=check_weights(source))
    weight_map = require_safetensors(base)
    if form == "decilm":
        require_decilm(source.hf_config, weight_map)
    return StaticBase(source=source, form=form, content=content, weight_map=weight_map)


def export_static(
    base: StaticBase,
    output: Path,
    dropped: Mapping[str, Sequence[int]],
    *,
    maps: StaticMaps | None = None,
    adapters: AdapterSet | None = None,
    name: str = "",
    tokenizer: Any | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> StaticExport:
    """Write `output` from a base model without the `dropped` sublayers, whole or not at all.

    `dropped` has the layers by attn or mlp, as `sublayers` returns it; `maps` are what stands in
    their place (hf alone); `adapters` are added to the weights that stay; `name` is the base's hub
    id, if known; `tokenizer` takes the place of the base's; `facts` are rows of the model card;
    `progress` is told the bytes of each shard that is done. Shards that keep all their bytes are
    hard links. Raises CheckpointError, ConfigError or UnsupportedModelError.
    """
    if maps is not None and base.form == "decilm":
        raise ConfigError(NO_MAPS_IN_DECILM)
    _require_droppable(base.source, dropped, "" if maps is None else maps.site)
    gone, added = _changed_tensors(base, dropped, maps)
    source = base.source
    merging = None
    if adapters is not None:
        assert source.weights is not None
        merging = adapters, source.weights, source.folder
    done = StaticExport(folder=output, mode="overlay")
    with new_folder(output) as folder:
        if added:
            write_tensors(folder / SHARD, added)
        weights = put_base_weights(
            folder,
            base.source.folder,
            base.weight_map,
            without=gone,
            rewritten=merged_files(*merging) if merging else (),
            beside=dict.fromkeys(added, SHARD),
            progress=progress,
        )
        done.linked, done.removed, done.notes = weights.linked, weights.removed, weights.notes
        if merging:
            names = {SINGLE: RENAMED_SINGLE} if added else {}
            merge_adapter(folder, names, *merging, without=gone)
        put_rest(folder, base.source.folder, tokenizer)
        _put_config(folder, base, dropped, maps)
        made_from = base_name(name, source.folder)
        rows = _base_rows(made_from, adapters) | {"dropped": describe_dropped(dropped)}
        _put_card(folder, base, made_from, rows | _map_rows(maps) | dict(facts or {}))
    done.written = size_of(output) - done.linked
    return done


def _changed_tensors(
    base: StaticBase, dropped: Mapping[str, Sequence[int]], maps: StaticMaps | None
) -> tuple[set[str], dict[str, Tensor]]:
    """Return (names of the base's tensors that are gone, tensors that are added, by name)."""
    norms = {} if base.form == "hf" else NORMS
    added: dict[str, Tensor] = {}
    if maps is not None:
        norms = norms_behind(maps, base.source)
        added = stored_maps(maps, base.source, stack_of_layers(base.weight_map))
    return names_of_dropped(base.weight_map, dropped, norms), added


def _put_card(folder: Path, base: StaticBase, made_from: str, rows: Mapping[str, Any]) -> None:
    write_card(
        folder,
        base.source.folder,
        made_from,
        title="with sublayers dropped",
        summary=_SUMMARY,
        rows=rows,
        use=use_text(base.form, made_from),
    )


def _base_rows(made_from: str, adapters: AdapterSet | None) -> dict[str, str]:
    """Return the card's rows on the base and an adapter that is merged into it."""
    if adapters is None:
        return {"base model": f"{made_from}, frozen"}
    merged = f"{made_from}, an adapter merged into it"
    return {"base model": merged, "adapter": adapters.describe()}


def _map_rows(maps: StaticMaps | None) -> dict[str, str]:
    """Return the card's rows on what stands in the place of what was dropped."""
    if maps is None:
        return {}
    return {"compensation in their place": f"{maps.describe()}, in `{SHARD}`"}


def _put_config(
    folder: Path,
    base: StaticBase,
    dropped: Mapping[str, Sequence[int]],
    maps: StaticMaps | None,
) -> None:
    """Write config.json and the code that reads it."""
    if base.form == "hf":
        names = {"causal_lm": "DroppedForCausalLM", "decoder": "DroppedDecoder"}
        config = {**own_config(base.content, **names), "dropped": dict(dropped)}
        if maps is not None:
            config["compensation"] = maps.to_config()
        write_json(folder / "config.json", config)
        (folder / CODE).write_text(bundled_code("dropped"), encoding="utf-8")
    else:
        config = decilm_config(base.source.hf_config, base.content, dropped)
        write_json(folder / "config.json", config)
        write_decilm_code(folder)


def verify_static(
    folder: Path,
    base: Path,
    target: str,
    layers: Sequence[int],
    maps: StaticMaps | None = None,
    adapters: AdapterSet | None = None,
) -> Verified:
    """Compare the logits of `folder`, in a fresh process, with those of its base whose `target` is
    forced off in `layers`, with `maps` as the compensations and `adapters` in the weights.

    Routers that have not learnt score 0.5; under a threshold above that they skip everything.
    """
    never = RouterConfig(granularity=f"{target}_sequence", layers=tuple(layers), threshold=0.9)
    if maps is not None:
        never = dataclasses.replace(never, compensation=maps.kind, compensation_rank=maps.rank)
    with tempfile.TemporaryDirectory() as scratch:
        routers = RouterSet(never, layers, describe_folder(base).hidden_size)
        for layer, tensors in ({} if maps is None else maps.tensors).items():
            compensation = routers.router(layer).compensation
            assert compensation is not None
            compensation.load_state_dict(dict(tensors))
        if adapters is not None:
            routers.take_adapters(adapters)
        return verify_folder(folder, base, save_routers(Path(scratch) / "never", routers))


def _require_droppable(
    source: ModelSource, dropped: Mapping[str, Sequence[int]], mapped: str
) -> None:
    """Raise unless each dropped sublayer is there, and zeros in its place stay zero.

    `mapped` is the sublayer in whose place a map stands, attn or mlp; "" without maps.
    """
    parts = find_decoder(skeleton(source))
    last = len(parts.layers) - 1
    if not any(dropped.values()) or dropped.keys() - WORDS.keys():
        raise ConfigError(f"nothing to drop in {dict(dropped)}; name layers of attn or mlp")
    for target, index in [(key, index) for key, layers in dropped.items() for index in layers]:
        if not 0 < index <= last:
            raise ConfigError(
                f"layer {index} cannot be dropped: expected one of layers 1 to {last}"
            )
        if target != mapped:
            _require_zero_update(parts.layers[index], parts.model_type, target)


def _require_zero_update(layer: nn.Module, model_type: str, target: str) -> None:
    """Raise UnsupportedModelError when a norm behind a sublayer adds something to its zeros."""
    sites = find_sites(layer, model_type)
    updates = {"attn": sites.attention_update, "mlp": sites.mlp_update}
    behind = updates[target] not in (sites.attention, sites.mlp)
    if behind and getattr(getattr(layer, updates[target]), "bias", None) is not None:
        raise UnsupportedModelError(
            f"{model_type}: {updates[target]} behind the {WORDS[target]} has a bias, so a dropped "
            "sublayer would still add something"
        )
