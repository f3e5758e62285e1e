"""vLLM's model classes of exports: made from vLLM's own class of the base when asked for by name.

vLLM imports this module and asks for e.g. MegaskipDroppedLlamaForCausalLM.
"""

import functools
from typing import Any

from vllm import ModelRegistry

from megaskip.serving.vllm.dropped import DroppedModel
from megaskip.serving.vllm.names import DROPPED, split_architecture
from megaskip.serving.vllm.routed import RoutedModel


def __getattr__(name: str) -> Any:
    """Return the model class of an export's architecture."""
    kind, base = split_architecture(name)
    if base not in ModelRegistry.get_supported_archs():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return model_class(name)


@functools.cache
def model_class(name: str) -> type:
    """Return the model class of an export's architecture, a subclass of its base's."""
    kind, base = split_architecture(name)
    adds = DroppedModel if kind == DROPPED else RoutedModel
    made_from = ModelRegistry.models[base].load_model_cls()
    return type(name, (adds, made_from), {"__module__": __name__})
