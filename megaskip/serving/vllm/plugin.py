"""The entry point of the group vllm.general_plugins, which every process of vLLM calls once."""

from transformers import AutoConfig

from megaskip.extras import extra
from megaskip.inference.hf import MODEL_TYPE
from megaskip.serving.vllm.configs import reader_class
from megaskip.serving.vllm.names import KINDS, base_architectures

_MODELS = "megaskip.serving.vllm.models"


def register() -> None:
    """Make exported folders known to vLLM: their configs, model classes and what those ask for."""
    with extra("vllm"):
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from megaskip.serving.vllm.settings import settings_class

    known = set(ModelRegistry.get_supported_archs())
    for family, base in base_architectures().items():
        AutoConfig.register(f"{MODEL_TYPE}_{family}", reader_class(family), exist_ok=True)
        for name in (kind + base for kind in KINDS):
            if base in known and name not in MODELS_CONFIG_MAP:
                # By name: a model's module is imported by the process that builds the model.
                ModelRegistry.register_model(name, f"{_MODELS}:{name}")
                MODELS_CONFIG_MAP[name] = settings_class(name)
