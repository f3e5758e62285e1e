"""Adapted models as transformers knows them: a config and a model class, for any family.

A config names its family in `base_model_type`; the classes are made from the family's own, so
nothing of it is repeated here. What is adapted is in routed.py and dropped.py.
"""

import functools
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import conversion_mapping as conversions

MODEL_TYPE = "megaskip"


class MegaskipConfig(PreTrainedConfig):
    """The config of a family with further fields: `base_model_type`, and `routing` or `dropped`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the config in a folder, of the class made for its family."""
        if "base_model_type" in cls.__dict__:
            return super().from_pretrained(path, **kwargs)
        content, _ = cls.get_config_dict(path, **kwargs)
        return config_class(_family(content)).from_pretrained(path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config in `config_dict`, of the class made for its family."""
        if "base_model_type" in cls.__dict__:
            return super().from_dict(config_dict, **kwargs)
        return config_class(_family(config_dict)).from_dict(config_dict, **kwargs)


class AdaptedModel:
    """What megaskip adds to a family's model class; from_pretrained makes the class of the
    family."""

    config_class: Any = MegaskipConfig
    _keep_in_fp32_modules_strict: Any = frozenset()
    _auto_class: str | None = None
    _skip_mapping: Any
    """The family's model class by config class."""
    _skip_auto_class: str

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self._skip_adapt(config)

    def _skip_adapt(self, config: Any) -> None:
        """Change the model as its config says; raises ValueError when it says nothing."""
        raise NotImplementedError

    def _skip_require(self, path: Any, missing: Any) -> None:
        """Raise OSError when names that are `missing` in the stored weights must be there."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a folder; the class is made for its family."""
        if "_skip_family" in cls.__dict__:
            asked = kwargs.pop("output_loading_info", False)
            loaded, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, config=config, output_loading_info=True, **kwargs
            )
            loaded._skip_require(path, info["missing_keys"])
            return (loaded, info) if asked else loaded
        if config is None:
            config = MegaskipConfig.from_pretrained(path)
        made = model_class(config.base_model_type, cls)  # type: ignore[arg-type]
        return made.from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if "_skip_family" in cls.__dict__:
            return super()._from_config(config, **kwargs)  # type: ignore[misc]
        made = model_class(config.base_model_type, cls)  # type: ignore[arg-type]
        return made._from_config(config, **kwargs)

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """Raise ValueError: vLLM asks this before it runs a class by code of its own, in which all
        requests share one row."""
        raise ValueError(_NEEDS_PLUGIN)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Note under which auto class the folder names this one."""
        name = cls._skip_auto_class if auto_class is None else auto_class
        cls._auto_class = name if isinstance(name, str) else name.__name__


_NEEDS_PLUGIN = (
    "vLLM needs megaskip's plugin for this folder: pip install megaskip[vllm] where vLLM runs. If "
    "VLLM_PLUGINS is set, name megaskip there. Without it vLLM would run transformers' code, in "
    "which its requests would be mixed"
)


@functools.cache
def config_class(family: str) -> Any:
    """Return the config class for a family, e.g. llama: its own, with a model_type of its own."""
    return type(
        MegaskipConfig.__name__,
        (MegaskipConfig, CONFIG_MAPPING[family]),
        {
            "__module__": MegaskipConfig.__module__,
            "model_type": f"{MODEL_TYPE}_{family}",
            "base_model_type": family,
        },
    )


@functools.cache
def model_class(family: str, kind: Any) -> Any:
    """Return the model class for a family: `kind` on top of the family's own."""
    base = kind._skip_mapping[CONFIG_MAPPING[family]]
    made = config_class(family)
    _share_conversions(family, made.model_type)
    strict = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ())
    return type(
        kind.__name__,
        (kind, base),
        {
            "__module__": kind.__module__,
            "config_class": made,
            "_skip_family": family,
            "_keep_in_fp32_modules_strict": strict | kind._keep_in_fp32_modules_strict,
        },
    )


def _share_conversions(family: str, model_type: str) -> None:
    """Let stored names be converted as the family's are; custom classes do not inherit that."""
    mapping = conversions.get_checkpoint_conversion_mapping(family)
    if mapping is not None:
        conversions.register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def _family(content: dict[str, Any]) -> str:
    family = content.get("base_model_type")
    if family not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json: base_model_type is {family!r}, which this version of transformers does "
            "not know"
        )
    return str(family)
