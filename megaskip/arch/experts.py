"""The experts of a mixture: how many its config says there are, and where its layers have them.

Layers of transformers 5 hold all experts in one module, called with the tokens [N, D], the experts
of each [N, K] and how much each of them counts [N, K].
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from megaskip.arch.sites import Sites
from megaskip.config.routing import RoutingConfig
from megaskip.errors import UnsupportedModelError
from megaskip.routing.experts import Experts

_COUNT = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
"""What configs of transformers call these numbers."""


def find_experts(config: Mapping[str, Any]) -> Experts | None:
    """Return the experts of a model with a text config of this content; None for a dense one."""
    count, per_token = (_first_number(config, names) for names in (_COUNT, _PER_TOKEN))
    return Experts(count=count, per_token=per_token) if count > 1 and per_token else None


def routed_experts(config: RoutingConfig, hf_config: Any) -> Experts | None:
    """Return the experts of a model with `hf_config` where they are what is skipped, else None;
    raises UnsupportedModelError for a dense model."""
    if not config.routes_experts:
        return None
    experts = find_experts(hf_config.get_text_config(decoder=True).to_dict())
    if experts is None:
        raise UnsupportedModelError(
            f"{hf_config.model_type}: --granularity expert_token needs a mixture of experts, and "
            "this model's config names none; take another --granularity, such as mlp_token"
        )
    return experts


def experts_of(layer: nn.Module, sites: Sites, experts: Experts, where: str) -> nn.Module:
    """Return the module that holds all experts of a decoder layer, which an error calls `where`;
    raises UnsupportedModelError when there is none of that number."""
    module = getattr(getattr(layer, sites.mlp), "experts", None)
    if module is None:
        raise UnsupportedModelError(
            f"{where} has no experts that --granularity expert_token could skip: its {sites.mlp} "
            "has no module called experts; leave the layer out of --layers, or take mlp_token"
        )
    count = getattr(module, "num_experts", None)
    if count != experts.count:
        raise UnsupportedModelError(
            f"{where} holds its experts in a {type(module).__name__} with {count or 'no'} "
            f"num_experts, expected one module with all {experts.count}; take mlp_token"
        )
    return module


def _first_number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)
