"""The DeepSpeed JSON: it owns sharding, and nothing that RunConfig owns. No silent overrides."""

import json
from pathlib import Path
from typing import Any

from megaskip.config import ParallelConfig, RunConfig
from megaskip.config.checks import did_you_mean
from megaskip.errors import ConfigError
from megaskip.extras import extra

# A routed 70B layer holds 856M parameters: room for two lets one be prefetched while another
# computes (DeepSpeed's defaults of 1e9 and 5e7 allow neither).
_LIVE_LAYERS = 2


def read_ds_config(path: str | None, run: RunConfig | None = None) -> dict[str, Any] | None:
    """Return the checked content of a DeepSpeed JSON, or None without one.

    A training `run` owns batch size, precision and stages, so the JSON may not contradict it; any
    other job uses the sharding alone. Raises ConfigError with every problem.
    """
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--ds_config {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--ds_config {path}: not valid JSON ({error})") from None
    _require_objects(path, content)
    problems = [] if run is None else _conflicts(path, content, run)
    problems += _never_ours(path, content) + _unsupported(path, content)
    parallel = ParallelConfig() if run is None else run.parallel
    problems += _pipeline_conflicts(path, content, parallel) + _wrong_zero(path, content)
    if problems:
        raise ConfigError(*problems)
    return dict(content)


def zero3_config(
    content: dict[str, Any], *, layer_numel: int, largest_numel: int
) -> dict[str, Any]:
    """Return the JSON that DeepSpeed gets: every "auto" resolved from the size of a decoder layer.

    The backbone has no optimizer: batch sizes are formal, and gradients never pass through
    DeepSpeed.
    """
    zero = {k: v for k, v in content.get("zero_optimization", {}).items() if v != "auto"}
    live = _LIVE_LAYERS * layer_numel + largest_numel
    defaults = {
        "stage3_max_live_parameters": live,
        "stage3_prefetch_bucket_size": int(1.05 * layer_numel),
        "stage3_max_reuse_distance": layer_numel,
        "stage3_param_persistence_threshold": 16384,
        "reduce_bucket_size": 1_000_000,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**defaults, **zero, "stage": 3},
        **{k: v for k, v in content.items() if k in _PASSED_ON},
    }


_PASSED_ON = ("aio", "comms_logger")
_SECTIONS = ("zero_optimization", "pipeline", "bf16", "fp16")
_CHECKED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""What the flags own."""


def require_dtype(content: dict[str, Any], dtype: str) -> None:
    """Raise ConfigError when the JSON says something else about bfloat16 than the type, such as
    "float32", that the weights get (--dtype auto takes the stored one)."""
    asked = content.get("bf16", {}).get("enabled", "auto")
    if asked not in ("auto", dtype == "bfloat16"):
        raise ConfigError(
            f"the DeepSpeed JSON sets bf16.enabled to {asked}, but the backbone is loaded as "
            f'{dtype}; name the type with --dtype, and write "auto" in the JSON'
        )


def _wrong_zero(path: str, content: dict[str, Any]) -> list[str]:
    """Return what DeepSpeed itself would refuse in zero_optimization, deep inside its start."""
    with extra("train"):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {k: v for k, v in content.get("zero_optimization", {}).items() if v != "auto"}
    known = DeepSpeedZeroConfig.model_fields
    names = {alias for name, field in known.items() for alias in (name, field.alias) if alias}
    problems = [
        f"--ds_config {path}: zero_optimization has no setting {name!r}{did_you_mean(name, names)}"
        for name in sorted(given.keys() - names)
    ]
    offload = given.get("offload_param", {})
    if offload.get("device") == "nvme" and not offload.get("nvme_path"):
        problems.append(f"--ds_config {path}: offload_param to nvme needs an nvme_path")
    if problems:
        return problems
    try:
        DeepSpeedZeroConfig(**given)
    except (ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        problems.append(f"--ds_config {path}: zero_optimization is not DeepSpeed's ({reason})")
    return problems


def _require_objects(path: str, content: Any) -> None:
    """Raise ConfigError unless the JSON and its sections are objects."""
    sections = {"the file": content}
    if isinstance(content, dict):
        sections |= {name: content[name] for name in _SECTIONS if name in content}
        zero = content.get("zero_optimization", {})
        if isinstance(zero, dict) and "offload_param" in zero:
            sections["zero_optimization.offload_param"] = zero["offload_param"]
    for name, value in sections.items():
        if not isinstance(value, dict):
            raise ConfigError(f"--ds_config {path}: {name} must be an object, found {value!r}")


def _conflicts(path: str, content: dict[str, Any], run: RunConfig) -> list[str]:
    """Return where the JSON says something else than a run's flags about what the flags own."""
    optim = run.optim
    owned = {
        "train_micro_batch_size_per_gpu": ("--micro_batch_size", optim.micro_batch_size),
        "gradient_accumulation_steps": (
            "--gradient_accumulation_steps",
            optim.gradient_accumulation_steps,
        ),
        "gradient_clipping": ("--max_grad_norm", optim.max_grad_norm),
    }
    problems = [
        f"--ds_config {path} sets {key} to {content[key]}, but {flag} is {value}; make them equal, "
        'or write "auto" in the JSON'
        for key, (flag, value) in owned.items()
        if content.get(key, "auto") not in ("auto", value)
    ]
    if content.get("train_batch_size", "auto") != "auto":
        problems.append(
            f"--ds_config {path} sets train_batch_size to {content['train_batch_size']}; the batch "
            'is --micro_batch_size x --gradient_accumulation_steps x ranks, write "auto" or remove '
            "it"
        )
    problems += [
        f"--ds_config {path} enables {key}, but --dtype is {run.model.dtype}"
        for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16"))
        if _enables(content, key) and run.model.dtype not in ("auto", dtype)
    ]
    if run.model.train == "full":
        problems.append(
            "--train full trains every weight on every rank and does not shard yet; leave "
            f"--ds_config {path} out"
        )
    return problems


def _never_ours(path: str, content: dict[str, Any]) -> list[str]:
    """Return what no job of megaskip takes from the JSON, whatever its flags are."""
    flags_of = {"optimizer": "--lr and --weight_decay", "scheduler": "--warmup_ratio"}
    problems = [
        f"--ds_config {path} has a section {key!r}; megaskip's flags {flags} own it, remove the "
        "section"
        for key, flags in flags_of.items()
        if key in content
    ]
    if _enables(content, "fp16"):
        problems.append(
            f"--ds_config {path} enables fp16; megaskip runs backbones in bfloat16 or float32"
        )
    return problems


def _enables(content: dict[str, Any], section: str) -> bool:
    return content.get(section, {}).get("enabled", "auto") is True


def _pipeline_conflicts(path: str, content: dict[str, Any], parallel: ParallelConfig) -> list[str]:
    """Return where ZeRO stage, pipeline section and --pipeline_stages do not go together."""
    stage = content.get("zero_optimization", {}).get("stage")
    section, stages = content.get("pipeline", {}), parallel.pipeline_stages
    if stages == 1 and section:
        return [f"--ds_config {path} is for a pipeline; say of how many with --pipeline_stages"]
    if stages == 1 and stage != 3:
        return [
            f"--ds_config {path} has ZeRO stage {stage!r}, expected 3: with a frozen backbone, "
            "stages 1 and 2 have nothing to shard; leave --ds_config out to keep the whole model "
            "on every rank"
        ]
    if stages == 1:
        return []
    problems = []
    if stage not in (0, None):
        problems.append(
            f"--ds_config {path} has ZeRO stage {stage!r}, but --pipeline_stages {stages} wants 0: "
            "stages hold the backbone in slices, and the optimizer state of the routers is a few "
            "kilobytes; take ds_configs/pipeline.json"
        )
    owned = {"stages": stages, "partition": parallel.pipeline_partition}
    for key, value in owned.items():
        if section.get(key, "auto") not in ("auto", value):
            problems.append(
                f"--ds_config {path} sets pipeline.{key} to {section[key]!r}, but "
                f'--pipeline_{key} is {value}; make them equal, or write "auto" in the JSON'
            )
    zero = content.get("zero_optimization", {})
    ignored = [f"pipeline.{key}" for key in section if key not in owned]
    ignored += [f"zero_optimization.{key}" for key in zero if key != "stage"]
    ignored += [key for key in content if key in _PASSED_ON]
    if ignored and not problems:
        names = ", ".join(ignored)
        problems.append(
            f"--ds_config {path} sets {names}, which has no effect on stages; remove it"
        )
    return problems


def _unsupported(path: str, content: dict[str, Any]) -> list[str]:
    known = (*_PASSED_ON, *_SECTIONS, *_CHECKED)
    problems = [
        f"--ds_config {path} sets {key}, which has no effect here; remove it"
        f"{did_you_mean(key, known)}"
        for key in content
        if key not in known
    ]
    if "offload_optimizer" in content.get("zero_optimization", {}):
        problems.append(
            f"--ds_config {path} has offload_optimizer; the optimizer state is a few kilobytes, "
            "remove the section"
        )
    return problems
