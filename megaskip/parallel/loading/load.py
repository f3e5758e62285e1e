"""Weights from disk to where they belong: whole on every rank, or each rank's own slice of a
partition."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from megaskip.config import ModelConfig
from megaskip.config.run import DEMO
from megaskip.errors import ConfigError, MegaskipError
from megaskip.log import get_logger

logger = get_logger(__name__)

DEMO_FOLDER = Path(__file__).parents[2] / "demo"
_WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.py")


def find_model_folder(config: ModelConfig) -> Path:
    """Return the local folder of --model, downloading it from the hub if it is an id. Safe on every
    rank."""
    if config.model == DEMO:
        return DEMO_FOLDER / "backbone"
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {folder}: no config.json in this folder")
        return folder
    if folder.is_absolute() or config.model.startswith(".") or config.model.count("/") != 1:
        raise ConfigError(f"--model {config.model}: no such folder")
    try:
        found = snapshot_download(
            config.model, revision=config.revision, allow_patterns=list(_WEIGHT_FILES)
        )
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"--model {config.model}: neither a folder here nor a model that the hub gave us "
            f"({_first_line(error)})"
        ) from None
    return Path(found)


def load_hf_config(folder: Path, config: ModelConfig) -> Any:
    """Return the HF config of a model folder; raises ConfigError when it is not one of a
    decoder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--model {folder}: cannot read its config.json ({_first_line(error)})"
        ) from None


def weight_dtype(config: ModelConfig, hf_config: Any) -> torch.dtype:
    """Return the type that the backbone's weights have in memory: float32 where they train."""
    if config.dtype == "auto" and config.train == "full":
        return torch.float32
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    stored = getattr(hf_config, "dtype", None) or torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def say_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Log that the other type would be faster, where a CPU can only emulate bfloat16."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if dtype == torch.bfloat16 and device.type == "cpu" and x86 and not _multiplies_bfloat16():
        logger.info(
            "bfloat16 on a CPU without instructions for it: --dtype float32 needs twice the memory "
            "and a fraction of the time"
        )


def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is None or supported()


def load_whole(
    folder: Path,
    hf_config: Any,
    dtype: torch.dtype,
    config: ModelConfig,
    device: torch.device | None,
) -> nn.Module:
    """Return the model with all of its weights on `device`, or where they were put without one.
    Every rank calls it by itself."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=dtype,
            **_how_to_build(config),
        )
    except (OSError, ValueError, ImportError) as error:
        raise MegaskipError(
            f"--model {folder}: cannot load its weights ({_first_line(error)})"
        ) from None
    return model if device is None else model.to(device)


def load_partitioned(
    folder: Path,
    hf_config: Any,
    dtype: torch.dtype,
    config: ModelConfig,
    ds_config: Mapping[str, Any],
) -> nn.Module:
    """Return the model with its weights partitioned by ZeRO-3; no rank ever holds it whole.
    Collective.

    Each rank maps the safetensors shards and copies its own slice of every tensor: no
    communication, and a rank reads 1/W of the bytes. Models whose stored names are not those of the
    module (MoE experts that transformers fuses on loading), or that store buffers, go through
    from_pretrained, where rank 0 reads and scatters.
    """
    import deepspeed
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    shards = tensor_files(folder)
    offload = ds_config["zero_optimization"].get("offload_param", {}).get("device")
    why = _why_scattered(skeleton(hf_config, config), shards)
    if offload == "nvme" or why:
        why = why or "NVMe offload"
        logger.info("weights are read by rank 0 and scattered (%s)", why)
        return _load_by_transformers(folder, hf_config, dtype, config, ds_config)
    # zero.Init makes torch.arange follow the weights' type, which would round RoPE's frequencies to
    # bfloat16.
    with (
        transformers.initialization.no_init_weights(),
        prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=_with_dtype(ds_config, dtype)),
    ):
        model = build_from_config(hf_config, config, dtype)
    # Construction without initialisation leaves tied embeddings apart.
    model.tie_weights()
    _fill_partitions(model, shards)
    return model


@torch.no_grad()
def _fill_partitions(model: nn.Module, shards: Mapping[str, Path]) -> None:
    """Copy this rank's slice of every parameter from the mapped shards into its partition."""
    by_file: dict[Path, list[tuple[str, Any]]] = {}
    for name, parameter in model.named_parameters():
        by_file.setdefault(shards[name], []).append((name, parameter))
    for file, parameters in sorted(by_file.items()):
        with safe_open(file, framework="pt") as handle:
            for name, parameter in parameters:
                stored = handle.get_tensor(name)
                if tuple(stored.shape) != tuple(parameter.ds_shape):
                    raise MegaskipError(
                        f"{file}: {name} has shape {tuple(stored.shape)}, config.json asks for "
                        f"{tuple(parameter.ds_shape)}"
                    )
                rank = parameter.ds_process_group.rank()
                _copy_slice(parameter.ds_tensor, stored, rank)
                if parameter.ds_secondary_tensor is not None:
                    # hpZ gathers from this second copy, which is sharded over a node's ranks.
                    rank %= parameter.ds_secondary_tensor_group_size
                    _copy_slice(parameter.ds_secondary_tensor, stored, rank)


def _copy_slice(partition: Any, stored: torch.Tensor, rank: int) -> None:
    """Copy the part of `stored` that belongs to the partition of `rank`; the rest is padding."""
    start = partition.ds_numel * rank
    mine = stored.view(-1)[start : start + partition.ds_numel]
    partition.data[: mine.numel()].copy_(mine)


def _load_by_transformers(
    folder: Path,
    hf_config: Any,
    dtype: torch.dtype,
    config: ModelConfig,
    ds_config: Mapping[str, Any],
) -> nn.Module:
    from transformers.integrations import HfDeepSpeedConfig

    # It must live while the model loads.
    live = HfDeepSpeedConfig(_with_dtype(ds_config, dtype))
    # DeepSpeed has put the partitions where they belong.
    model = load_whole(folder, hf_config, dtype, config, None)
    del live
    return model


def _with_dtype(ds_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the JSON that makes partitions of type `dtype`.

    zero.Init's own argument is not used: on a CPU, DeepSpeed 0.19.8 takes any given dtype for
    bfloat16.
    """
    return {**ds_config, "bf16": {"enabled": dtype == torch.bfloat16}}


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each stored tensor; empty when there are no safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as handle:
        return dict.fromkeys(handle.keys(), single)


def _why_scattered(model: nn.Module, shards: Mapping[str, Path]) -> str | None:
    """Return why ranks cannot fill their partitions of `model` from the shards, None if they
    can."""
    parameters = {name for name, _ in model.named_parameters()}
    if not shards or not parameters <= shards.keys():
        return "stored tensor names differ from the module's"
    buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    return "the model stores buffers, too" if buffers else None


def skeleton(hf_config: Any, config: ModelConfig) -> nn.Module:
    """Return the model without weights, on the meta device."""
    with torch.device("meta"):
        return build_from_config(hf_config, config)


def build_from_config(
    hf_config: Any, config: ModelConfig, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the model of a config, its weights not loaded; raises ConfigError when it cannot be
    built."""
    try:
        return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, **_how_to_build(config))
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"--model {config.model}: cannot be built as a decoder ({_first_line(error)})"
        ) from None


def _how_to_build(config: ModelConfig) -> dict[str, Any]:
    """Return what transformers needs to be told besides the HF config."""
    choice = config.attn_implementation
    return {
        "attn_implementation": None if choice == "auto" else choice,
        "trust_remote_code": config.trust_remote_code,
    }


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
