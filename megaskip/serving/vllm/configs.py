"""The config of an exported folder as vLLM gets it: its base's, with what is left out beside it.

Type and fields are the base's, for vLLM asks them in many places; only the architecture is ours.
The class is not: transformers would take it for the base's, and load the base's model. Imports
transformers, not vLLM.
"""

import functools
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from megaskip.errors import ConfigError
from megaskip.inference.hf import MODEL_TYPE
from megaskip.serving.vllm.names import DROPPED, ROUTED, base_architectures

_PREFIX = "Served_"


class ServedConfig(PreTrainedConfig):
    """Reads an exported folder's config.json and returns a config of the base's class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config in `config_dict` as vLLM gets it."""
        served = served_content(config_dict)
        return served_class(served["model_type"]).from_dict(served, **kwargs)


def reader_class(family: str) -> type[PreTrainedConfig]:
    """Return the class to register for exports of a family, e.g. llama."""
    return type(ServedConfig.__name__, (ServedConfig,), {"model_type": f"{MODEL_TYPE}_{family}"})


@functools.cache
def served_class(family: str) -> Any:
    """Return the class of configs that vLLM gets, a subclass of the family's own."""
    return type(f"{_PREFIX}{family}", (CONFIG_MAPPING[family],), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """Return a class of configs by its name: vLLM sends configs to other processes."""
    if name.startswith(_PREFIX):
        return served_class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def served_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an exported folder's config.json as its base's with vLLM's name for the export.

    Raises ConfigError where it is none.
    """
    family = content.get("base_model_type", "")
    if family not in (bases := base_architectures()):
        raise ConfigError(
            f"config.json: base_model_type is {family!r}, which this version of transformers has "
            "no causal language model for"
        )
    kinds = {"dropped": DROPPED, "routing": ROUTED}
    kind = [kinds[key] for key in kinds if content.get(key) is not None]
    if len(kind) != 1:
        raise ConfigError(
            "config.json has neither dropped nor routing, or both; expected one of them, as "
            "megaskip export-static and megaskip convert write it"
        )
    return {**content, "model_type": family, "architectures": [kind[0] + bases[family]]}
