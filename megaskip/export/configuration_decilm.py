"""The config of a DeciLM model: Llama's, with a block of its own for each layer.

Written by megaskip beside the weights of a model with dropped layers. Needs transformers only;
servers bring the model itself (vLLM: DeciLMForCausalLM). Apache-2.0.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose fields are attributes too, as servers read them."""

    def __getattr__(self, name: str) -> Any:
        """Return a field."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """Llama's fields and `block_configs`: what each layer has of attention and MLP."""

    model_type = "nemotron-nas"

    block_configs: list[Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        blocks = self.block_configs or []
        self.block_configs = [
            Block({name: Block(fields) for name, fields in block.items()}) for block in blocks
        ]
