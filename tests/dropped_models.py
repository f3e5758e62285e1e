"""Tiny models without some of their sublayers, and the base with those forced off."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from families import tiny_model
from safetensors import safe_open
from torch._dynamo.utils import counters

from megaskip import RouterConfig, attach_routers
from megaskip.export.static import sublayers
from megaskip.export.static_folder import StaticExport, export_static, require_exportable

LAYERS = (1, 3, 4)
"""That lose a sublayer; layer 1 is the first of gemma2's that attends to everything."""


def static(
    folder: Path, family: str = "llama", target: str = "attn", form: str = "hf", **options: Any
) -> tuple[Path, Any]:
    """Return (exported folder, its base as a model whose `target` is forced off in LAYERS)."""
    model = tiny_model(family, **options)
    model.save_pretrained(folder / "base", max_shard_size="60KB")
    dropped_from(folder, sublayers(target, LAYERS), form)
    return folder / "out", forced_off(model, target)


def dropped_from(folder: Path, dropped: Any, form: str = "hf", **options: Any) -> StaticExport:
    base = require_exportable(folder / "base", folder / "out", form)
    return export_static(base, folder / "out", dropped, **options)


def forced_off(model: Any, target: str) -> Any:
    config = RouterConfig(granularity=f"{target}_sequence", layers=LAYERS)
    attach_routers(model, config).place([math.inf] * len(LAYERS))
    return model


def stored_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            names |= set(handle.keys())
    return names


def decoded_as_on_a_gpu(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """Return (tokens, graphs) of a generation whose steps torch.compile takes down whole, as
    transformers does on a GPU where the cache is static; here the graphs run as they were taken."""
    torch.compiler.reset()
    counters.clear()
    settings = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True
    tokens = model.generate(ids, attention_mask=mask, compile_config=settings, **options)
    return tokens, counters["stats"]["unique_graphs"]
