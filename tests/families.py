"""Tiny models of every supported family: one row each, built in code, no network."""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {}),
    "granite": (
        "GraniteConfig",
        {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 3.0},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
    "olmo2": ("Olmo2Config", {}),
    "glm4": ("Glm4Config", {"partial_rotary_factor": 0.5}),
}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    # It scales the residual stream too, so a skipped sublayer is not the identity.
    "minimax": (
        "MiniMaxConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * 6,
            "full_attn_alpha_factor": 2.0,
            "mlp_alpha_factor": 2.0,
        },
    ),
}

# Whose experts are skipped one by one; other tests need no more mixtures than those above.
MORE_MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
        },
    ),
}

MIXTURES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "minimax", *MORE_MIXTURES)

# transformers before 5.13 calls torch._grouped_mm for experts whatever the device; torch 2.8 has it
# for Hopper GPUs only.
MIXTURES_RUN = Version(torch.__version__) >= Version("2.9") or Version(
    transformers.__version__
) >= Version("5.13")
if not MIXTURES_RUN:
    for _family in MIXTURES:
        FAMILIES.pop(_family, None)


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the tiny config of a family."""
    if family in MIXTURES and not MIXTURES_RUN:
        pytest.skip("with torch 2.8, transformers before 5.13 runs no experts on a CPU")
    name, extra = {**FAMILIES, **REFUSED, **MORE_MIXTURES}[family]
    return getattr(transformers, name)(**{**COMMON, **extra, **overrides})


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> Any:
    """Return a tiny float32 model whose sublayers move the residual as much as a trained model's
    do."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    _enlarge(model)
    return model.eval()


def _enlarge(model: nn.Module) -> None:
    """Scale matrices up.

    Freshly initialised sublayers hardly touch the residual, which would hide mistakes.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(6.0)
