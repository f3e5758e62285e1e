"""DeciLM as servers run it, made from a folder alone: the layer rules of vLLM's nemotron_nas.py,
with transformers' Llama parts. Layer inputs and residuals stay apart until a norm adds them."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


def load_decilm(folder: Path) -> "DeciLM":
    """Return the model of a folder; its tensors must be exactly those of the modules."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = "eager"
    model = DeciLM(config)
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()


class DeciLM(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        layers = [_Layer(config, index) for index in range(config.num_hidden_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": LlamaRMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.rotary = [LlamaRotaryEmbedding(config)]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, residual = self.model["embed_tokens"](ids), None
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        rotary = self.rotary[0](hidden, positions)
        for layer in self.model["layers"]:
            hidden, residual = layer(hidden, residual, rotary)
        hidden, _ = _add_and_norm(self.model["norm"], hidden, residual)
        return self.lm_head(hidden)


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        block, own = config.block_configs[index], copy.copy(config)
        if not block.attention.no_op:
            own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
            self.self_attn = LlamaAttention(own, index)
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if not block.ffn.no_op:
            size = int(2 * block.ffn.ffn_mult * config.hidden_size / 3)
            own.intermediate_size = size if size % 256 == 0 else size + 256 - size % 256
            self.mlp = LlamaMLP(own)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, residual: Any, rotary: Any) -> tuple[Tensor, Any]:
        if hasattr(self, "self_attn"):
            hidden, residual = _add_and_norm(self.input_layernorm, hidden, residual)
            tokens = hidden.shape[1]
            mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
            hidden, _ = self.self_attn(hidden, rotary, mask)
        if hasattr(self, "mlp"):
            hidden, residual = _add_and_norm(self.post_attention_layernorm, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual


def _add_and_norm(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Any]:
    total = hidden if residual is None else hidden + residual
    return norm(total), total
