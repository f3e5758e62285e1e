"""Routed models as transformers knows them: a decoder and a causal LM, for any family.

A config describes the routers in `routing`.
"""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.utils import logging

from megaskip.arch.decision_cache import cached_decisions
from megaskip.arch.decoder import find_decoder
from megaskip.arch.experts import routed_experts
from megaskip.arch.wiring import real_tokens, wire
from megaskip.config.routing import KV_CHOICES, RoutingConfig
from megaskip.inference.executor import InferenceExecutor
from megaskip.inference.hf import AdaptedModel
from megaskip.inference.static_decode import StaticGeneration
from megaskip.routing.decision import RoutingDecision
from megaskip.routing.gate import Gate
from megaskip.routing.router import PREFIX, Router
from megaskip.routing.routers import Routers

_HF_LOGGER = logging.get_logger(__name__)


class RecallingGate(Gate):
    """A gate that notices when activation checkpointing computes a layer of an earlier forward pass
    again: what that pass was told and decided is no longer known."""

    def _settle(self, decision: RoutingDecision) -> None:
        earlier = self._state.decisions.get(self.layer)
        if earlier is not None and not torch.equal(earlier.keep, decision.keep):
            raise RuntimeError(_OTHER_PASS.format(self.layer))
        super()._settle(decision)


class RoutedModel(StaticGeneration, AdaptedModel):
    """What a routed model adds to its family's class."""

    _keep_in_fp32_modules_strict = frozenset({PREFIX})

    def _skip_adapt(self, config: Any) -> None:
        """Attach the routers that the config's `routing` describes."""
        if getattr(config, "routing", None) is None:
            raise ValueError("config.json has no routing")
        if (adapter := config.routing.get("adapter")) not in (None, "merged"):
            _HF_LOGGER.warning(_NEEDS_ADAPTER, adapter)
        kv = config.routing.get("kv", "keep")
        if kv not in KV_CHOICES:
            raise ValueError(f"config.routing: kv is {kv!r}, expected one of {KV_CHOICES}")
        settings, layers = RoutingConfig.from_dict(config.routing), tuple(config.routing["layers"])
        parts = find_decoder(self)  # type: ignore[arg-type]
        executor = InferenceExecutor(unit=settings.unit, kv=kv)
        size, experts = parts.hidden_size, routed_experts(settings, config)
        kinds: dict[str, Any] = {"executor": executor, "experts": experts, "gate": RecallingGate}
        routers = Routers(settings, layers, size, **kinds)
        wire(parts, routers)
        self.add_module(PREFIX, routers)  # type: ignore[attr-defined]
        # On the decoder, too: peft calls the model's forward, so that no hook of the model runs.
        for module in dict.fromkeys((self, parts.decoder)):
            # First: the decoder's own hook asks for it.
            module.register_forward_pre_hook(_take_prompt_mask, with_kwargs=True, prepend=True)  # type: ignore[attr-defined]
            module.register_forward_hook(_release, always_call=True)  # type: ignore[attr-defined]

    def _skip_require(self, path: Any, missing: Any) -> None:
        """Raise OSError when the stored weights lack routers: fresh ones skip nothing."""
        lacking = sorted(name for name in missing if name.startswith(f"{PREFIX}."))
        if lacking:
            raise OSError(
                f"{path}: {len(lacking)} routers are missing ({lacking[0]}, ...), so nothing would "
                "be skipped; copy or download the folder again, with skip_routers.safetensors"
            )

    def _init_weights(self, module: nn.Module) -> None:
        # A router that no file holds keeps everything.
        if isinstance(module, Router):
            nn.init.zeros_(module.weight)
        elif not isinstance(module, Routers):
            super()._init_weights(module)  # type: ignore[misc]

    def capacity(self) -> float:
        """Return the share of routed units that ran in the last forward pass."""
        return _routers_of(self).capacity()

    def set_capacity(self, capacity: float) -> None:
        """Skip more or less from now on: `capacity` is one that megaskip calibrate calibrated."""
        routers = _routers_of(self)
        routers.set_capacity(capacity)
        chosen = {"capacity": routers.config.capacity, "threshold": routers.config.threshold}
        self.config.routing = {**self.config.routing, **chosen}  # type: ignore[attr-defined]

    def _validate_generation_mode(self, mode: Any, config: Any, kwargs: Any) -> None:
        """Refuse ways to generate in which a first forward pass is not the prompt alone."""
        if _routers_of(self).config.unit == "sequence":
            refused = [name for name, wrong in _not_the_prompt(mode, config).items() if wrong]
            if refused:
                raise ValueError(_JUDGED_BY_PROMPT.format(refused[0]))
        super()._validate_generation_mode(mode, config, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse for routers: requests share a flat row there, and decisions would mix them.

        Every way into continuous batching comes through here.
        """
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)


class MegaskipForCausalLM(RoutedModel, PreTrainedModel):  # type: ignore[misc]
    """A routed causal language model; from_pretrained makes the class of the family."""

    _skip_mapping, _skip_auto_class = MODEL_FOR_CAUSAL_LM_MAPPING, "AutoModelForCausalLM"


class MegaskipModel(RoutedModel, PreTrainedModel):  # type: ignore[misc]
    """A routed decoder without head; from_pretrained makes the class of the family."""

    _skip_mapping, _skip_auto_class = MODEL_MAPPING, "AutoModel"


_NEEDS_ADAPTER = (
    "this model was trained with the LoRA adapter in the subfolder %s; without it it is another "
    "model: PeftModel.from_pretrained(model, folder, subfolder=...) of peft loads it"
)
_JUDGED_BY_PROMPT = (
    "generate() with {} does not go with routers that decide per sequence: they judge a text by "
    "its first forward pass, which must hold the whole prompt and nothing else, and keep that in "
    "the cache. Leave it out, or use routers that decide per token"
)
_JUDGED_ALREADY = (
    "prompt_mask says what a sequence is judged by, and those of this cache were judged in their "
    "first forward pass; leave it out of calls that continue a text"
)
_OTHER_PASS = (
    "gradient checkpointing computes layer {} again after another forward pass of this model, and "
    "a routed model knows the decisions of its last one alone: call backward() before the next "
    "forward pass (also of a reference model that shares its weights), or leave checkpointing off"
)
_NO_TRACE = (
    "what a routed model computes depends on the text that it reads, so torch.export, "
    "torch.jit.trace and ONNX cannot record it; megaskip export-static makes a model of which they "
    "can"
)
_NO_CONTINUOUS_BATCHING = (
    "megaskip models do not run under continuous batching: it puts all requests into one row, "
    "where a router cannot tell them apart. Use generate() on a padded batch"
)


def _not_the_prompt(mode: Any, config: Any) -> dict[str, bool]:
    """Return what of a generation's settings keeps a first forward pass from being the prompt."""
    return {
        "use_cache=False": config.use_cache is False,
        "prefill_chunk_size": getattr(config, "prefill_chunk_size", None) is not None,
        "assisted decoding or prompt lookup": mode == GenerationMode.ASSISTED_GENERATION,
    }


def _release(module: nn.Module, args: Any, output: Any) -> None:
    _routers_of(module).state.lock.release()


def _take_prompt_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Let `model(..., prompt_mask=...)` say which tokens a sequence is judged by."""
    routers = _routers_of(module)
    routers.state.lock.acquire()
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise NotImplementedError(_NO_TRACE)
    prompt_mask = kwargs.pop("prompt_mask", None)
    if prompt_mask is None:
        return args, kwargs
    if cached_decisions(kwargs.get("past_key_values")):
        raise ValueError(_JUDGED_ALREADY)
    routers.set_batch(real_tokens(args, kwargs), prompt_mask.bool())
    return args, kwargs


def _routers_of(module: Any) -> Routers:
    """Return the routers of a routed model or of its decoder."""
    routers: Routers = module.__dict__.get("_skip_routers") or module.get_submodule(PREFIX)
    return routers
