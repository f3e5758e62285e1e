"""Which model is meant: its folder, its config and how its weights are read, found out once.

Everything that builds, loads, estimates or describes a base model takes a ModelSource.
"""

import copy
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from transformers import AutoConfig

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.base import BaseModel, describe_base
from megaskip.checkpoint.header import require_no_pointer
from megaskip.checkpoint.stored_weights import ADAPTER
from megaskip.config import ModelConfig
from megaskip.config.run import DEMO
from megaskip.errors import CheckpointError, ConfigError, first_line
from megaskip.log import get_logger
from megaskip.parallel.loading.four_bit import FourBit, stored_four_bit
from megaskip.parallel.loading.weight_plan import WeightPlan

logger = get_logger(__name__)

DEMO_FOLDER = Path(__file__).parents[2] / "demo"
_SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.py")
_WEIGHT_FILES = ("*.safetensors",)
CONFIG_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(RecursionError, ImportError, StrictDataclassError),
)
"""What transformers and its configuration classes raise for values that they do not expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A base model on this machine, and how it is read into memory."""

    name: str
    """What the model was asked for by: a folder, a hub id or "demo"."""
    folder: Path
    """Holds its files; of a hub id, the snapshot in the cache."""
    revision: str | None
    """Branch, tag or commit that was asked for; None for the default one."""
    hf_config: Any
    """The content of config.json, but for what `four_bit` says. Shared by all users, so builders
    change copies of it."""
    dtype: torch.dtype
    """Type of the weights in memory."""
    attn_implementation: str | None
    """Attention as transformers names it; None takes what transformers prefers for the family."""
    trust_remote_code: bool
    """Whether code in the folder may run."""
    four_bit: FourBit | None = None
    """How linear layers are packed, computing in `dtype`; None for a base that is in `dtype`."""
    weights: WeightPlan | None = None
    """Which stored tensor becomes which weight; None until its files are checked."""

    @property
    def text_config(self) -> Any:
        """Return the part of the config that describes the decoder."""
        return self.hf_config.get_text_config(decoder=True)

    @property
    def packed_name(self) -> str:
        """Return what messages call a base that lies in 4 bit in its folder; "" for any other."""
        if self.four_bit is None or not self.four_bit.is_stored:
            return ""
        return f"--model {self.name}, in 4 bit ({self.four_bit}),"

    @property
    def build_options(self) -> dict[str, Any]:
        """Return what transformers is told besides the config and the type."""
        return {
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    def describe(self) -> BaseModel:
        """Return the model's identity, with a fingerprint of its weight files."""
        return describe_base(self.hf_config, self.folder, self.revision, name=self.name)


def resolve_source(config: ModelConfig, folder: Path | None = None) -> ModelSource:
    """Return the model that `config` names, downloaded if it is a hub id. Safe on every rank.

    `folder` is where it is, if that was found before. Raises ConfigError when there is no such
    model or its config.json cannot be read.
    """
    folder = find_model_folder(config) if folder is None else folder
    require_no_pointer(folder / "config.json")
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except CONFIG_ERRORS as error:
        exported = "megaskip exported it: give its base model"
        reason = exported if _is_exported(folder) else first_line(error)
        raise ConfigError(f"--model {folder}: cannot read its config.json ({reason})") from None
    return source_in(folder, hf_config, config)


def source_in(folder: Path, hf_config: Any, config: ModelConfig) -> ModelSource:
    """Return the source of a model whose folder and HF config are known already.

    Raises ConfigError for --base_dtype nf4 on a folder that is in 4 bit already, CheckpointError
    where there is no config.json.
    """
    attention = config.attn_implementation
    # Of the file, for `hf_config` may be that of an earlier source.
    four_bit = stored_four_bit(read_json(folder / "config.json").get("quantization_config"))
    if four_bit is not None:
        if config.base_dtype == "nf4":
            raise ConfigError(
                f"--base_dtype nf4: {folder} is in 4 bit already ({four_bit}); leave it out"
            )
        # Models are built with plain layers, which quantise_linears replaces.
        hf_config = copy.deepcopy(hf_config)
        vars(hf_config).pop("quantization_config", None)
    elif config.base_dtype == "nf4":
        four_bit = FourBit()
    return ModelSource(
        name=config.model,
        folder=folder,
        revision=config.revision,
        hf_config=hf_config,
        dtype=_weight_dtype(config, hf_config),
        attn_implementation=None if attention == "auto" else attention,
        trust_remote_code=config.trust_remote_code,
        four_bit=four_bit,
    )


def find_model_folder(config: ModelConfig, *, weights: bool = True) -> Path:
    """Return the local folder of a model, downloading it from the hub if it is an id: without
    `weights` only config and tokenizer. Safe on every rank."""
    if config.model == DEMO:
        return DEMO_FOLDER / "backbone"
    folder = Path(config.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--model {folder}: no config.json in this folder; {_instead(folder)}"
            )
        return folder
    if folder.is_file():
        raise ConfigError(f"--model {folder}: a file; {_instead(folder)}")
    if folder.is_absolute() or config.model.startswith(".") or config.model.count("/") != 1:
        raise ConfigError(
            f"--model {config.model}: no such folder; a hub id is OWNER/NAME, and {DEMO} is the "
            "model that ships with megaskip"
        )
    try:
        patterns = [*_SMALL_FILES, *(_WEIGHT_FILES if weights else ())]
        snapshot = snapshot_download(
            config.model, revision=config.revision, allow_patterns=patterns
        )
    except (RepositoryNotFoundError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"--model {config.model}: neither a folder here nor a model that the hub gave us "
            f"({first_line(error)})"
        ) from None
    return Path(snapshot)


def _is_exported(folder: Path) -> bool:
    from megaskip.inference.hf import MODEL_TYPE  # not where only the package is imported

    try:
        content = read_json(folder / "config.json")
    except CheckpointError:
        return False
    return str(content.get("model_type")).startswith(MODEL_TYPE)


def _instead(path: Path) -> str:
    """Return what to give in the place of a file, or of a folder without config.json."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    names = {file.name for file in files}
    if ADAPTER in names:
        return f"it holds {ADAPTER}: merge the adapter into its base"
    if names & {"run.json", "router_config.json"}:
        return "it holds routers: give their base model here, and this folder as --init_routers"
    if gguf := [file.name for file in files if file.suffix == ".gguf"]:
        return f"{gguf[0]}: GGUF is not read; give the Hugging Face folder that it was made from"
    inner = [file for file in files if (file / "config.json").is_file()]
    if inner:
        return f"did you mean {inner[-1]}?"
    return "give the folder that holds config.json and the weights as safetensors"


def _weight_dtype(config: ModelConfig, hf_config: Any) -> torch.dtype:
    """Return the type that the weights have in memory: float32 where they train."""
    if config.dtype == "auto" and config.train == "full":
        return torch.float32
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    stored = getattr(hf_config, "dtype", None) or torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored


def choose_arithmetic(dtype: torch.dtype, device: torch.device) -> None:
    """Let float32 matrices be multiplied as TF32 in this process, on a GPU, and say so; say that
    another type would be faster where a CPU can only emulate bfloat16."""
    if uses_tf32(dtype, device):
        torch.set_float32_matmul_precision("high")
        logger.info(
            "float32 on a GPU: matrices are multiplied as TF32 (NVIDIA_TF32_OVERRIDE=0: no)"
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if dtype == torch.bfloat16 and device.type == "cpu" and x86 and not _multiplies_bfloat16():
        logger.info(
            "bfloat16 on a CPU without instructions for it: --dtype float32 needs twice the memory "
            "and a fraction of the time"
        )


def uses_tf32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether `choose_arithmetic` has the tensor cores of a GPU multiply float32."""
    return dtype == torch.float32 and device.type == "cuda"


def _multiplies_bfloat16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is None or supported()
