"""Tiny trained-looking routed models: the training side, and what an export of it loads as."""

from pathlib import Path
from typing import Any

import torch
from families import tiny_model

from megaskip import RouterConfig, RouterSet, attach_routers, save_routers
from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import describe_base
from megaskip.export.folder import export_folder, routed_config
from megaskip.inference.hf import MegaskipConfig
from megaskip.inference.routed import MegaskipForCausalLM

VOCABULARY = 97


def trained(
    family: str,
    granularity: str = "attn_sequence",
    *,
    compensation: str = "none",
    **overrides: Any,
) -> tuple[Any, RouterSet]:
    """Return a tiny model whose routers decide by what they read."""
    model = tiny_model(family, **overrides)
    routers = attach_routers(model, router_config(granularity, compensation))
    randomise(routers)
    return model, routers


def router_config(granularity: str, compensation: str) -> RouterConfig:
    """Return settings of routers; maps are small, as the models are."""
    return RouterConfig(granularity=granularity, compensation=compensation, compensation_rank=4)


def randomise(routers: RouterSet, seed: int = 1) -> None:
    """Give routers weights with which rows and tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def as_exported(model: Any, routers: RouterSet, kv: str = "keep") -> Any:
    """Return the routed model as transformers loads it from an exported folder."""
    content = routed_config(model.config.to_dict(), routers.config, routers.layers, kv)
    content.pop("auto_map")
    exported = MegaskipForCausalLM._from_config(MegaskipConfig.from_dict(content)).eval()
    exported.load_state_dict(model.state_dict())
    return exported


def export(
    family: str,
    folder: Path,
    granularity: str = "attn_sequence",
    shard: str = "60KB",
    compensation: str = "none",
    **options: Any,
) -> Path:
    """Write base, routers and exported folder of a tiny model under `folder`; return the last."""
    model = tiny_model(family)
    model.save_pretrained(folder / "base", max_shard_size=shard)
    routers = attach_routers(model, router_config(granularity, compensation))
    randomise(routers)
    base = describe_base(model.config, folder / "base")
    save_routers(folder / "routers", routers, base=base)
    assert read_json(folder / "routers/router_config.json")["layers"] == [2, 3, 4]
    export_folder(folder / "routers", folder / "base", folder / "exported", **options)
    return folder / "exported"


def padded_ids(rows: int = 5, tokens: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows of different length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


def whole_ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Return ids of rows without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
