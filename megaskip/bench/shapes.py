"""Shapes of Llamas, and models of them with random weights: speed does not depend on weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes, and the numbers of parameters that follow; norms are left out."""

    name: str
    vocabulary: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        """Return the width of an attention head."""
        return self.hidden // self.heads

    @property
    def attention_parameters(self) -> int:
        """Return the weights of one layer's attention."""
        return 2 * self.hidden * (self.hidden + self.kv_heads * self.head_dim)

    @property
    def mlp_parameters(self) -> int:
        """Return the weights of one layer's MLP."""
        return 3 * self.hidden * self.mlp

    @property
    def head_parameters(self) -> int:
        """Return the weights of the output embedding."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Return all weights; the output embedding is not tied to that of the input."""
        layer = self.attention_parameters + self.mlp_parameters
        return self.layers * layer + 2 * self.head_parameters

    def kv_values(self, tokens: int) -> int:
        """Return the numbers that the cache holds for so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens


_SIZES = {
    # Name: vocabulary, hidden, MLP, layers, heads, heads of keys and values.
    "tiny": (4096, 256, 704, 8, 4, 2),
    "demo-110m": (8192, 768, 2048, 14, 12, 4),
    "llama3-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama3-8b": (128256, 4096, 14336, 32, 32, 8),
    "llama3-70b": (128256, 8192, 28672, 80, 64, 8),
}
SHAPES = {
    name: Shape(name=name, vocabulary=v, hidden=h, mlp=m, layers=n, heads=heads, kv_heads=kv)
    for name, (v, h, m, n, heads, kv) in _SIZES.items()
}


def config_of(shape: Shape) -> LlamaConfig:
    """Return the transformers config of a shape."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=131072,
    )


def build(config: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Return a model of a transformers config with random weights, made on the device."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
