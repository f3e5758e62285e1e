"""Tiny models with heads that vLLM's attention takes on a CPU, exported, served and compared."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megaskip import RouterConfig, RouterSet, attach_routers, save_routers
from megaskip.checkpoint.base import describe_base
from megaskip.checkpoint.routers import read_router_config
from megaskip.export.folder import export_folder
from megaskip.export.static import sublayers
from megaskip.export.static_folder import export_static, require_exportable
from megaskip.export.static_maps import read_static_maps
from megaskip.inference.dropped import DroppedForCausalLM
from megaskip.inference.routed import MegaskipForCausalLM

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.5, "logits_scaling": 3.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
LAYERS = (1, 3, 4)
LENGTHS = (5, 9, 17, 33, 12, 7, 21, 40)


def tiny_model(family: str) -> Any:
    """Return a tiny model whose sublayers move the residual as much as a trained model's do."""
    name, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**COMMON, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(3.0)
    return model.eval()


def write_routers(folder: Path, family: str, **settings: Any) -> None:
    """Write base and routers of a tiny model; routers decide by what they read."""
    model = tiny_model(family)
    model.save_pretrained(folder / "base")
    routers: RouterSet = attach_routers(model, RouterConfig(layers=LAYERS, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in routers.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            # As large as updates are, not larger.
            parameter.mul_(0.1 if "compensation" in name else 1.0)
    save_routers(folder / "routers", routers, base=describe_base(model.config, folder / "base"))


def routed_folder(folder: Path, family: str, **settings: Any) -> Path:
    """Write a tiny routed model and return its exported folder."""
    write_routers(folder, family, **settings)
    export_folder(folder / "routers", folder / "base", folder / "out")
    return folder / "out"


def static_folder(
    folder: Path, family: str, target: str = "attn", maps: str = "none", form: str = "hf"
) -> Path:
    """Write a tiny model without `target` in LAYERS and return its exported folder."""
    stored = None
    if maps == "none":
        tiny_model(family).save_pretrained(folder / "base")
    else:
        own = {"compensation": maps, "compensation_rank": 4, "budget": "static"}
        write_routers(folder, family, granularity=f"{target}_sequence", **own)
        config, routed, _ = read_router_config(folder / "routers")
        hidden = COMMON["hidden_size"]
        stored = read_static_maps(folder / "routers", config, routed, hidden, LAYERS)
    base = require_exportable(folder / "base", folder / "out", form)
    export_static(base, folder / "out", sublayers(target, LAYERS), maps=stored)
    return folder / "out"


@contextlib.contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    """Yield vLLM's engine of a folder, and take it down."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.freeze()  # vLLM collects eight times an engine, and its imports are a large heap
    settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "seed": 0}
    try:
        engine = LLM(
            str(folder),
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",
            **{**settings, **options},
        )
        try:
            yield engine
        finally:
            engine.llm_engine.engine_core.shutdown()
            del engine
    finally:
        # After a refusal, too: it leaves a process group that the next engine would take.
        cleanup_dist_env_and_memory()


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Return prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths
    ]


def sampling(tokens: int, **options: Any) -> Any:
    """Return what asks for so many greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    settings = {"temperature": 0, "logprobs": 0, "ignore_eos": True, **options}
    return SamplingParams(max_tokens=tokens, **settings)


def generate(engine: Any, asked: Sequence[list[int]], tokens: int = 12) -> list[Any]:
    """Return vLLM's answers to prompts that come together."""
    inputs = [{"prompt_token_ids": prompt} for prompt in asked]
    return [done.outputs[0] for done in engine.generate(inputs, sampling(tokens), use_tqdm=False)]


def load(folder: Path) -> Any:
    """Return an exported folder as transformers loads it, by the package's own classes."""
    content = (folder / "config.json").read_text()
    kind = MegaskipForCausalLM if '"routing"' in content else DroppedForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def require_equal(model: Any, asked: Sequence[list[int]], answers: Sequence[Any]) -> None:
    """Compare vLLM's tokens and log-probabilities with transformers, prompt by prompt."""
    for prompt, answer in zip(asked, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(answer.token_ids),
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens: Tensor = expected.sequences[0, len(prompt) :]
        assert list(answer.token_ids) == tokens.tolist()
        scores = torch.stack([logits[0] for logits in expected.logits]).float().log_softmax(-1)
        wanted = scores.gather(1, tokens[:, None]).squeeze(1)
        given = [
            step[token].logprob
            for step, token in zip(answer.logprobs, answer.token_ids, strict=True)
        ]
        # Already the dense gemma2 differs by 6e-5 there.
        atol = 1e-3 if "gemma" in model.config.model_type else 2e-5
        torch.testing.assert_close(torch.tensor(given), wanted, rtol=0, atol=atol)
