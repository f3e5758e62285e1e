"""What exported models ask of vLLM's settings: chosen where there is one way, refused elsewhere."""

from collections.abc import Iterator
from typing import Any

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from megaskip.config.routing import RoutingConfig
from megaskip.errors import ConfigError
from megaskip.log import get_logger
from megaskip.serving.vllm.names import ROUTED, split_architecture

logger = get_logger(__name__)
_REQUESTS = "megaskip.serving.vllm.requests:RowFollower"


def settings_class(architecture: str) -> type[VerifyAndUpdateConfig]:
    """Return what checks and changes vLLM's settings for an export's architecture."""
    kind, base = split_architecture(architecture)
    of_base = MODELS_CONFIG_MAP.get(base, VerifyAndUpdateConfig)
    adds = RoutedSettings if kind == ROUTED else VerifyAndUpdateConfig
    return type(adds.__name__, (adds, of_base), {}) if adds is RoutedSettings else of_base


class RoutedSettings(VerifyAndUpdateConfig):
    """Settings under which decisions about whole prompts are kept for each request."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what routed models do not run with, and choose the rest; says so in the log."""
        super().verify_and_update_config(vllm_config)
        problems = tuple(_problems(vllm_config))
        if problems:
            raise ConfigError(*problems)
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        model.enforce_eager = True  # what runs is another thing in each step
        if not vllm_config.use_v2_model_runner:
            model.logits_processors = [*(model.logits_processors or ()), _REQUESTS]
        # A router reads the whole prompt at once, and what it skips leaves no keys to share.
        vllm_config.cache_config.enable_prefix_caching = False
        scheduler.enable_chunked_prefill = False
        longest = max(scheduler.max_num_batched_tokens, model.max_model_len)
        scheduler.max_num_batched_tokens = longest
        logger.warning(
            "routed model: no graphs (--enforce-eager), no prefix caching, prompts in one piece "
            "(batches of up to %d tokens; --max-model-len lowers that)",
            longest,
        )


def _problems(vllm_config: Any) -> Iterator[str]:
    """Yield what a routed model cannot be served with."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    routing = model.hf_config.routing
    granularity = RoutingConfig.from_dict(routing).granularity
    if not granularity.endswith("_sequence"):
        yield (
            f"granularity {granularity}: vLLM runs routers that decide per sequence; those that "
            "decide per token run in transformers alone"
        )
    if routing.get("adapter") not in (None, "merged"):
        yield (
            "this folder has a LoRA adapter beside its weights; write it anew with megaskip "
            "convert --merge"
        )
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type}: routed models generate text"
    if model.enable_prompt_embeds:
        yield "--enable-prompt-embeds: routers judge prompts of tokens"
    if parallel.world_size_across_dp > 1:
        yield (
            f"{parallel.world_size_across_dp} processes (tensor, pipeline or data parallel): "
            "routed models were run on one alone"
        )
    others = {
        "speculative decoding": vllm_config.speculative_config,
        "--enable-lora": vllm_config.lora_config,
        "KV transfer": vllm_config.kv_transfer_config,
        "--long-prefill-token-threshold": vllm_config.scheduler_config.long_prefill_token_threshold,
    }
    for what, value in others.items():
        if value:
            yield f"{what} does not go with routed models; leave it out"
