"""A Hugging Face folder that anyone can load: base weights linked or copied, routers added.

Nothing of the base is rewritten: its shards keep their bytes, and an index names one more file.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megaskip.arch.experts import find_experts
from megaskip.checkpoint.adapters import FOLDER, read_adapter, write_adapter
from megaskip.checkpoint.atomic import new_folder, read_json, write_json, write_tensors
from megaskip.checkpoint.base import BaseModel, describe_folder, is_hub_id
from megaskip.checkpoint.routers import (
    CONFIG,
    WEIGHTS,
    read_router_config,
    read_router_weights,
)
from megaskip.checkpoint.stored_weights import read_stored_weights
from megaskip.checkpoint.weight_index import INDEX, SINGLE
from megaskip.config import ModelConfig, RouterConfig
from megaskip.config.commands.convert import MODES
from megaskip.config.paths import require_new
from megaskip.data.tokenizer import read_tokenizer
from megaskip.errors import ConfigError
from megaskip.export.base_weights import RENAMED_SINGLE, put_base_weights, require_safetensors
from megaskip.export.bundle import CODE, bundled_code
from megaskip.export.card import routing_rows, use_text, write_card
from megaskip.export.merge import MERGED, merge_adapter, merged_files
from megaskip.extras import MissingExtraError
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.loading.weight_plan import WeightPlan
from megaskip.routing import PREFIX
from megaskip.routing.adapters import AdapterSet
from megaskip.routing.compensation import is_compensation

ROUTER_SHARD = "skip_routers.safetensors"
_NOT_CARRIED = {"config.json", "README.md", INDEX, SINGLE}
_TOKENIZER = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json"),
}
"""What a base's tokenizer is read from; beside another one's files it would be mixed with them."""
_TEMPLATES = "additional_chat_templates"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx"}


@dataclass(kw_only=True)
class Exported:
    """What an export wrote."""

    folder: Path
    mode: str
    linked: int = 0
    """Bytes shared with the base by hard links."""
    written: int = 0
    """Bytes written."""
    notes: list[str] = field(default_factory=list)


def export_folder(
    routers: Path,
    base: Path,
    output: Path,
    *,
    mode: str = "overlay",
    kv: str = "keep",
    merge: bool = False,
    tokenizer: Any | None = None,
    facts: dict[str, Any] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Exported:
    """Write `output` from a router folder and its base model's folder, whole or not at all.

    `mode` and `kv` are as in ConvertOptions. With `merge` an adapter that was trained with the
    routers is added to the weights, without it the folder has it beside them. `tokenizer` takes the
    place of the base's; `facts` are numbers of the run for the model card; `progress` is told the
    bytes of each file that is done. Raises CheckpointError or ConfigError.
    """
    if mode not in MODES:
        raise ConfigError(f"--mode {mode!r} is not one of {', '.join(MODES)}")
    config, layers, described = read_router_config(routers)
    _require_droppable(config, mode, kv)
    require_new(output)
    done = Exported(folder=output, mode=mode)
    base_config = _config_of(base, described, mode)
    adapters = read_adapter(routers)
    if merge and adapters is None:
        raise ConfigError(f"--merge: {routers} has no adapter; leave it out")
    plan = _checked_weights(base, mode)
    tensors = _router_tensors(routers, config, layers, base_config)
    map_parameters = sum(t.numel() for n, t in tensors.items() if is_compensation(n))
    made_from = base_name(described.name if described is not None else "", base)
    with new_folder(output) as folder:
        if mode == "adapter":
            _put_routers(folder, routers, tokenizer)
        else:
            merging = (adapters, plan) if merge and adapters is not None and plan else None
            _put_weights(folder, base, tensors, done, progress, merging)
            put_rest(folder, base, tokenizer)
            content = routed_config(base_config, config, layers, kv)
            if adapters is not None:
                content["routing"]["adapter"] = MERGED if merge else FOLDER
            _put_config(folder, content)
        if adapters is not None and not merge:
            write_adapter(folder / FOLDER, adapters, made_from)
        rows = routing_rows(config, layers, kv, map_parameters=map_parameters)
        of_base = f"{made_from} ({base_config.get('model_type')})"
        rows |= _base_rows(of_base, adapters, merge=merge)
        write_card(
            folder,
            base,
            made_from,
            title="routed",
            summary="A model that learnt which layers it can skip.",
            rows={**rows, **(facts or {})},
            use=use_text("adapter" if mode == "adapter" else "routed", made_from),
        )
    done.written = size_of(output) - done.linked
    return done


def _checked_weights(base: Path, mode: str) -> WeightPlan | None:
    """Return which stored tensor becomes which weight of the base, whose files must be whole; None
    for the mode "adapter", in which its own modelling code, if it has any, is not run."""
    if mode == "adapter":
        read_stored_weights(base)
        return None
    return check_weights(resolve_source(ModelConfig(model=str(base))))


def _router_tensors(
    routers: Path, config: RouterConfig, layers: tuple[int, ...], base_config: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the weights of a router folder, checked against its base's config.json."""
    text_config = base_config.get("text_config", base_config)
    experts = find_experts(text_config) if config.routes_experts else None
    return read_router_weights(routers, layers, config, int(text_config["hidden_size"]), experts)


def _base_rows(of_base: str, adapters: AdapterSet | None, *, merge: bool) -> dict[str, str]:
    """Return the rows of a card about the base and an adapter of it."""
    if adapters is None:
        return {"base model": f"{of_base}, frozen, unchanged"}
    where = "added to its weights" if merge else f"in `{FOLDER}/`, for peft to load on this model"
    state = "the adapter merged into it" if merge else "frozen, unchanged"
    return {"base model": f"{of_base}, {state}", "adapter": f"{adapters.describe()}; {where}"}


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def routed_config(
    base: dict[str, Any], config: RouterConfig, layers: tuple[int, ...], kv: str
) -> dict[str, Any]:
    """Return the config.json of a routed model from that of its base."""
    # What training swept over, no inference asks for.
    stored = dataclasses.replace(config, layers=layers, capacity_low=None, freeze_routers=False)
    # Training leaves use_cache off; decisions are kept in the cache.
    cached = {"use_cache": True} if base.get("use_cache") is False else {}
    return {**own_config(base), **cached, "routing": {**dataclasses.asdict(stored), "kv": kv}}


def _put_config(folder: Path, content: dict[str, Any]) -> None:
    """Write config.json and the code that reads it, and let generation use the cache."""
    write_json(folder / "config.json", content)
    (folder / CODE).write_text(bundled_code("routed"), encoding="utf-8")
    generation = folder / "generation_config.json"
    if generation.is_file() and (settings := read_json(generation)).get("use_cache") is False:
        write_json(generation, {**settings, "use_cache": True})


def own_config(
    base: Mapping[str, Any],
    *,
    causal_lm: str = "MegaskipForCausalLM",
    decoder: str = "MegaskipModel",
) -> dict[str, Any]:
    """Return the base's config.json with the names that lead to the folder's own code: of its
    causal LM and of its decoder."""
    stem = CODE.removesuffix(".py")
    return {
        **base,
        "architectures": [causal_lm],
        "auto_map": {
            "AutoConfig": f"{stem}.MegaskipConfig",
            "AutoModel": f"{stem}.{decoder}",
            "AutoModelForCausalLM": f"{stem}.{causal_lm}",
        },
        "model_type": f"megaskip_{base['model_type']}",
        "base_model_type": base["model_type"],
    }


def base_name(recorded: str, base: Path) -> str:
    """Return the base's hub id, or the name of its folder."""
    return recorded if is_hub_id(recorded) else base.resolve().name


def _require_droppable(config: RouterConfig, mode: str, kv: str) -> None:
    """Raise ConfigError when keys and values are to be dropped that this export cannot drop."""
    if kv == "drop" and mode == "adapter":
        raise ConfigError(
            "--kv drop is stored in a whole folder; --mode adapter has no place for it"
        )
    if kv == "drop" and not config.skips_attention_by_token:
        raise ConfigError(
            "--kv drop is for tokens that skip attention (attn_token, block_token); with "
            f"{config.granularity} there is nothing to choose, leave it out"
        )


def _config_of(base: Path, described: BaseModel | None, mode: str) -> dict[str, Any]:
    """Return the base's config.json, once it is the model that the routers belong to."""
    content = read_json(base / "config.json")
    if "auto_map" in content and mode != "adapter":
        raise ConfigError(
            f"--base {base} brings modelling code of its own, which an exported folder cannot "
            "carry along; use --mode adapter"
        )
    if described is not None:
        described.require(describe_folder(base), "the router folder")
    return content


# -- weights, and what is not


def _put_weights(
    folder: Path,
    base: Path,
    routers: Mapping[str, Tensor],
    done: Exported,
    progress: Callable[[int], object],
    merging: tuple[AdapterSet, WeightPlan] | None,
) -> None:
    """Put the base's shards into `folder`, and one with the routers beside them; `merging` is an
    adapter that is added to them, and where they are stored."""
    named = {f"{PREFIX}.{name}": tensor for name, tensor in routers.items()}
    write_tensors(folder / ROUTER_SHARD, named)
    weights = put_base_weights(
        folder,
        base,
        require_safetensors(base),
        link=done.mode == "overlay",
        rewritten=merged_files(*merging, base) if merging else (),
        beside=dict.fromkeys(named, ROUTER_SHARD),
        progress=progress,
    )
    done.linked, done.notes = weights.linked, weights.notes
    if merging:
        merge_adapter(folder, {SINGLE: RENAMED_SINGLE}, *merging, base)
        done.notes = [*done.notes, "the adapter is merged into the weights"]


def put_rest(folder: Path, base: Path, tokenizer: Any | None = None) -> None:
    """Copy generation config, licence, tokenizer and chat template; the last two from `tokenizer`
    where it is given.

    The base's tokenizer is written anew, as what it is: which class reads its files depends on the
    model_type beside them, and the exported folder's is another. Nothing is linked, for whoever
    edits such a file in place means this folder's.
    """
    saved: set[str] = set()
    tokenizer = tokenizer if tokenizer is not None else _tokenizer_of(base)
    if tokenizer is not None:
        saved = _TOKENIZER | {Path(file).name for file in tokenizer.save_pretrained(folder)}
    elif (base / _TEMPLATES).is_dir():
        shutil.copytree(base / _TEMPLATES, folder / _TEMPLATES)
    for source in sorted(base.iterdir()):
        hidden = source.name.startswith(".") or source.name in _NOT_CARRIED | saved
        if hidden or source.suffix in _WEIGHT_SUFFIXES or not source.is_file():
            continue
        if not source.name.endswith(".index.json"):
            shutil.copyfile(source, folder / source.name)


def _tokenizer_of(base: Path) -> Any | None:
    """Return the base's tokenizer; None without one that transformers reads by itself."""
    if not any((base / name).is_file() for name in _TOKENIZER):
        return None
    try:
        # Its own code would not come along: then its files are copied as they are.
        return read_tokenizer(base, trust_remote_code=False)
    except (ConfigError, MissingExtraError):
        return None


def _put_routers(folder: Path, routers: Path, tokenizer: Any | None) -> None:
    """Copy the files of a router folder, with a tokenizer beside them where one is given."""
    for name in (WEIGHTS, CONFIG):
        shutil.copyfile(routers / name, folder / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
