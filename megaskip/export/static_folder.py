"""A model's folder without the sublayers that are dropped for good, for servers that cannot route.

What the routers learnt about single inputs is lost; what is left is a smaller model for all.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from megaskip._version import __version__
from megaskip.arch.decoder import find_decoder
from megaskip.arch.sites import find_sites
from megaskip.checkpoint.atomic import new_folder, read_json, write_json
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import save_routers
from megaskip.checkpoint.weight_index import INDEX
from megaskip.config import ModelConfig, RouterConfig
from megaskip.config.commands.export_static import FORMATS
from megaskip.errors import CheckpointError, ConfigError, UnsupportedModelError
from megaskip.export.bundle import CODE, bundled_code
from megaskip.export.card import card_metadata
from megaskip.export.decilm import NORMS, decilm_config, require_decilm, write_decilm_code
from megaskip.export.folder import (
    Exported,
    base_name,
    link_or_copy,
    own_config,
    put_rest,
    require_new,
    require_safetensors,
    size_of,
)
from megaskip.export.shards import bytes_of, copy_without, names_of_dropped
from megaskip.export.static import WORDS, describe_dropped
from megaskip.export.verify import Verified, verify_folder
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.whole import skeleton
from megaskip.routing import RouterSet

_USE = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```

Needs torch and transformers; `modeling_megaskip.py` is all of the code.""",
    "decilm": """```bash
vllm serve "this folder" --trust-remote-code
```

Needs a server that runs DeciLM ("nemotron-nas") models, as vLLM does; `configuration_decilm.py` is
its config class. transformers alone has no such model.""",
}


@dataclass(kw_only=True)
class StaticExport(Exported):
    """What a static export wrote, and what it left out."""

    removed: int = 0
    """Bytes of the base's tensors that are gone."""


def export_static(
    base: Path,
    output: Path,
    dropped: Mapping[str, Sequence[int]],
    *,
    form: str = "hf",
    name: str = "",
    tokenizer: Any | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> StaticExport:
    """Write `output` from a base model's folder without the `dropped` sublayers, whole or not at
    all.

    `dropped` has the layers by attn or mlp, as `sublayers` returns it; `form` is "hf" for
    transformers or "decilm" for servers; `name` is the base's hub id, if known; `tokenizer` takes
    the place of the base's; `facts` are rows of the model card; `progress` is told the bytes of
    each shard that is done. Shards that lose nothing are hard links. Raises CheckpointError,
    ConfigError or UnsupportedModelError.
    """
    content, source, weight_map = require_exportable(base, output, form)
    _require_droppable(source, dropped)
    if form == "hf":
        names = {"causal_lm": "DroppedForCausalLM", "decoder": "DroppedDecoder"}
        config = {**own_config(content, **names), "dropped": dict(dropped)}
    else:
        config = decilm_config(source.hf_config, content, dropped)
    gone = names_of_dropped(weight_map, dropped, None if form == "hf" else NORMS)
    done = StaticExport(folder=output, mode="overlay")
    with new_folder(output) as folder:
        _put_weights(folder, base, weight_map, gone, done, progress)
        put_rest(folder, base, tokenizer)
        write_json(folder / "config.json", config)
        if form == "hf":
            (folder / CODE).write_text(bundled_code("dropped"), encoding="utf-8")
        else:
            write_decilm_code(folder)
        rows = {"dropped": describe_dropped(dropped), **(facts or {})}
        _write_card(folder, base, base_name(name, base), form, rows)
    done.written = size_of(output) - done.linked
    return done


def require_exportable(
    base: Path, output: Path, form: str
) -> tuple[dict[str, Any], ModelSource, dict[str, str]]:
    """Return (config.json, source, file of each tensor) of a base that `form` can express.

    What can be refused before anything is measured or loaded is refused here.
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
    weight_map = require_safetensors(base)
    if form == "decilm":
        require_decilm(source.hf_config, weight_map)
    return content, source, weight_map


def verify_static(folder: Path, base: Path, target: str, layers: Sequence[int]) -> Verified:
    """Compare the logits of `folder`, in a fresh process, with those of its base whose `target` is
    forced off in `layers`.

    Routers that have not learnt score 0.5; under a threshold above that they skip everything.
    """
    never = RouterConfig(granularity=f"{target}_sequence", layers=tuple(layers), threshold=0.9)
    with tempfile.TemporaryDirectory() as scratch:
        routers = RouterSet(never, layers, describe_folder(base).hidden_size)
        return verify_folder(folder, base, save_routers(Path(scratch) / "never", routers))


def _require_droppable(source: ModelSource, dropped: Mapping[str, Sequence[int]]) -> None:
    """Raise unless each dropped sublayer is there, and zeros in its place stay zero."""
    parts = find_decoder(skeleton(source))
    last = len(parts.layers) - 1
    if not any(dropped.values()) or dropped.keys() - WORDS.keys():
        raise ConfigError(f"nothing to drop in {dict(dropped)}; name layers of attn or mlp")
    for target, index in [(key, index) for key, layers in dropped.items() for index in layers]:
        if not 0 < index <= last:
            raise ConfigError(
                f"layer {index} cannot be dropped: expected one of layers 1 to {last}"
            )
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


def _put_weights(
    folder: Path,
    base: Path,
    weight_map: Mapping[str, str],
    gone: set[str],
    done: StaticExport,
    progress: Callable[[int], object],
) -> None:
    """Link the shards that lose nothing, rewrite the others, and write their index, if any."""
    total = 0
    for file in sorted(set(weight_map.values())):
        shard = base / file
        if not shard.is_file():
            raise CheckpointError(f"--base {base}: its index names {file}, which is not there")
        names = {name for name, holder in weight_map.items() if holder == file}
        size, lost = bytes_of(shard, names), bytes_of(shard, names & gone)
        if lost:
            copy_without(shard, folder / shard.name, gone)
        else:
            link_or_copy(shard, folder / shard.name, done)
        total += size - lost
        done.removed += lost
        progress(shard.stat().st_size)
    if (base / INDEX).is_file():
        stays = {name: file for name, file in sorted(weight_map.items()) if name not in gone}
        index = {"metadata": {"total_size": total}, "weight_map": stays}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_card(folder: Path, base: Path, name: str, form: str, rows: Mapping[str, Any]) -> None:
    head = yaml.safe_dump(card_metadata(base, name), sort_keys=False)
    facts = {"base model": f"{name}, frozen", **rows, "megaskip": __version__}
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    text = (
        f"---\n{head}---\n\n# {Path(name).name}, with sublayers dropped\n\nA model without some "
        f"of its sublayers, chosen with routers (Router-Tuning, arXiv 2410.13184).\n\n| | |\n"
        f"|---|---|\n{table}\n\n{_USE[form]}\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
