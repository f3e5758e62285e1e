"""Routed models as transformers knows them: a config, a decoder and a causal LM, for any family.

A config names its family in `base_model_type`, its routers in `routing` and sublayers that are gone
in `dropped`; the classes are made from the family's own, so nothing of it is repeated here.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)
from transformers import conversion_mapping as conversions
from transformers.generation import GenerationMode

from megaskip.arch.decoder import find_decoder
from megaskip.arch.wiring import wire
from megaskip.config.router import KV_CHOICES, RouterConfig
from megaskip.inference.dropped import drop_sublayers
from megaskip.inference.executor import InferenceExecutor
from megaskip.routing.router import PREFIX, Router
from megaskip.routing.routers import Routers

MODEL_TYPE = "megaskip"


class MegaskipConfig(PreTrainedConfig):
    """The config of a family with further fields: `base_model_type`, and `routing` or `dropped`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
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


class _RoutedModel:
    """What a routed model adds to its family's class."""

    _skip_mapping: Any
    config_class: Any = MegaskipConfig
    _keep_in_fp32_modules_strict = frozenset({PREFIX})
    # Decisions change what is computed, which a full graph cannot.
    _can_compile_fullgraph = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        routing, dropped = getattr(config, "routing", None), getattr(config, "dropped", None)
        if routing is None and dropped is None:
            raise ValueError("config.json has neither routing nor dropped")
        drop_sublayers(find_decoder(self), dropped or {})  # type: ignore[arg-type]
        if routing is not None:
            self._route(dict(routing))

    def _route(self, routing: dict[str, Any]) -> None:
        """Attach the routers that a config's `routing` describes."""
        kv = routing.pop("kv", "keep")
        if kv not in KV_CHOICES:
            raise ValueError(f"config.routing: kv is {kv!r}, expected one of {KV_CHOICES}")
        layers = tuple(routing.pop("layers"))
        settings = RouterConfig(layers=layers, **routing)
        parts = find_decoder(self)  # type: ignore[arg-type]
        executor = InferenceExecutor(unit=settings.unit, kv=kv)
        routers = Routers(settings, layers, parts.hidden_size, executor=executor)
        wire(parts, routers)
        self.add_module(PREFIX, routers)  # type: ignore[attr-defined]
        # First: where the model is the decoder itself, the decoder's own hook asks for it.
        self.register_forward_pre_hook(_take_prompt_mask, with_kwargs=True, prepend=True)  # type: ignore[attr-defined]
        self.register_forward_hook(_release, always_call=True)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a folder; the class is made for its family."""
        if "_skip_family" in cls.__dict__:
            asked = kwargs.pop("output_loading_info", False)
            loaded, info = super().from_pretrained(  # type: ignore[misc]
                path, *args, config=config, output_loading_info=True, **kwargs
            )
            _require_routers(path, info["missing_keys"])
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

    def _init_weights(self, module: nn.Module) -> None:
        # A router that no file holds keeps everything.
        if isinstance(module, Router):
            nn.init.zeros_(module.weight)
        elif not isinstance(module, Routers):
            super()._init_weights(module)  # type: ignore[misc]

    def capacity(self) -> float:
        """Return the share of routed units that ran in the last forward pass."""
        if not self._is_routed():
            raise RuntimeError("this model has no routers: its config has dropped, not routing")
        return self.get_submodule(PREFIX).capacity()  # type: ignore[attr-defined, no-any-return]

    def set_capacity(self, capacity: float) -> None:
        """Skip more or less from now on: `capacity` is one that tools/calibrate.py calibrated."""
        if not self._is_routed():
            raise RuntimeError("this model has no routers: its config has dropped, not routing")
        routers: Any = self.get_submodule(PREFIX)  # type: ignore[attr-defined]
        routers.set_capacity(capacity)
        chosen = {"capacity": routers.config.capacity, "threshold": routers.config.threshold}
        self.config.routing = {**self.config.routing, **chosen}  # type: ignore[attr-defined]

    def _validate_generation_mode(self, mode: Any, config: Any, kwargs: Any) -> None:
        """Refuse ways to generate in which a first forward pass is not the prompt alone."""
        if self._is_routed() and self.get_submodule(PREFIX).config.unit == "sequence":  # type: ignore[attr-defined]
            found = [name for name, wrong in _not_the_prompt(mode, config).items() if wrong]
            if found:
                raise ValueError(_JUDGED_BY_PROMPT.format(found[0]))
        super()._validate_generation_mode(mode, config, kwargs)  # type: ignore[misc]

    def _is_routed(self) -> bool:
        return hasattr(self, PREFIX)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse for routers: requests share a flat row there, and decisions would mix them.

        Every way into continuous batching comes through here.
        """
        if self._is_routed():
            raise NotImplementedError(_NO_CONTINUOUS_BATCHING)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


class MegaskipForCausalLM(_RoutedModel):
    """A routed causal language model; from_pretrained makes the class of the family."""

    _skip_mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    _auto_class: str | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Note under which auto class the folder names this one."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__


class MegaskipModel(_RoutedModel):
    """A routed decoder without head; from_pretrained makes the class of the family."""

    _skip_mapping = MODEL_MAPPING
    _auto_class: str | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Note under which auto class the folder names this one."""
        cls._auto_class = auto_class if isinstance(auto_class, str) else auto_class.__name__


_JUDGED_BY_PROMPT = (
    "generate() with {} does not go with routers that decide per sequence: they judge a text by "
    "its first forward pass, which must hold the whole prompt and nothing else, and keep that in "
    "the cache. Leave it out, or use routers that decide per token"
)
_NO_CONTINUOUS_BATCHING = (
    "megaskip models do not run under continuous batching: it puts all requests into one row, "
    "where a router cannot tell them apart. Use generate() on a padded batch"
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
    strict = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ()) | {PREFIX}
    return type(
        kind.__name__,
        (kind, base),
        {
            "__module__": kind.__module__,
            "config_class": made,
            "_skip_family": family,
            "_keep_in_fp32_modules_strict": strict,
        },
    )


def _share_conversions(family: str, model_type: str) -> None:
    """Let stored names be converted as the family's are; custom classes do not inherit that."""
    mapping = conversions.get_checkpoint_conversion_mapping(family)
    if mapping is not None:
        conversions.register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


def _not_the_prompt(mode: Any, config: Any) -> dict[str, bool]:
    """Return what of a generation's settings keeps a first forward pass from being the prompt."""
    return {
        "use_cache=False": config.use_cache is False,
        "prefill_chunk_size": getattr(config, "prefill_chunk_size", None) is not None,
        "assisted decoding or prompt lookup": mode == GenerationMode.ASSISTED_GENERATION,
    }


def _family(content: dict[str, Any]) -> str:
    family = content.get("base_model_type")
    if family not in CONFIG_MAPPING:
        raise ValueError(
            f"config.json: base_model_type is {family!r}, which this version of transformers does "
            "not know"
        )
    return str(family)


def _require_routers(path: Any, missing: Any) -> None:
    """Raise OSError when the stored weights lack routers: fresh ones skip nothing."""
    lacking = sorted(name for name in missing if name.startswith(f"{PREFIX}."))
    if lacking:
        raise OSError(
            f"{path}: {len(lacking)} routers are missing ({lacking[0]}, ...), so nothing would be "
            "skipped; copy or download the folder again, with skip_routers.safetensors"
        )


def _release(module: nn.Module, args: Any, output: Any) -> None:
    _routers_of(module).state.lock.release()


def _take_prompt_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let `model(..., prompt_mask=...)` say which tokens a sequence is judged by."""
    routers = _routers_of(module)
    routers.state.lock.acquire()
    prompt_mask = kwargs.pop("prompt_mask", None)
    if prompt_mask is None:
        return args, kwargs
    mask = kwargs.get("attention_mask")
    real = torch.ones_like(prompt_mask) if not isinstance(mask, Tensor) else mask
    routers.set_batch(real.bool(), prompt_mask.bool())
    return args, kwargs


def _routers_of(module: Any) -> Routers:
    routers: Routers = module.get_submodule(PREFIX)
    return routers
