"""From a model to a smaller one, in three jobs that go on where they stood: fit, train, export."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaskip.checkpoint.atomic import read_json, write_json
from megaskip.checkpoint.hub import require_hub
from megaskip.checkpoint.routers import CONFIG
from megaskip.config.commands.fit import DropOptions
from megaskip.config.paths import require_new
from megaskip.errors import ConfigError, MegaskipError
from megaskip.log import get_logger, set_up_logging
from megaskip.parallel.child import run_child

logger = get_logger(__name__)

_LEARNING = ("steps", "batch_size", "distill", "compensation_lr")
"""Options of the training."""
RECORD = "drop.json"
"""In the work folder: the flags that its content belongs to."""


def drop(options: DropOptions) -> None:
    """Run what is left of the three jobs, each in processes of its own; raises MegaskipError when
    one fails."""
    set_up_logging(rank=0)
    require_new(options.output)
    require_hub(options.hub)
    if options.adapter.lora_rank:
        _require_mergeable(options)
    work = options.work_dir or options.output.with_name(f"{options.output.name}.work")
    _begin(work, options)
    fitted, run = work / "fitted", work / "run"
    if not (fitted / CONFIG).is_file():
        _run(options, ["fit", *_fit_flags(options), "--output", str(fitted)])
    if options.steps and not (run / "report.json").is_file():
        _run(options, ["train", *_train_flags(options, fitted), "--output_dir", str(run)])
    command = [sys.executable, "-m", "megaskip", "export-static", *_export_flags(options, work)]
    where = ["--output", str(options.output), *_flags(dataclasses.asdict(options.hub))]
    _start([*command, *where, "--verify"])


def _require_mergeable(options: DropOptions) -> None:
    """Raise ConfigError for a base to whose weights no adapter can be added, before one trains."""
    from megaskip.config import ModelConfig
    from megaskip.parallel.loading.source import find_model_folder, resolve_source

    base = options.base
    model = ModelConfig(
        model=base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
    )
    source = resolve_source(model, find_model_folder(model, weights=False))
    if source.packed_name:
        raise ConfigError(
            f"--lora_rank is merged into the weights at the end, and those of {base.model} are "
            "packed in 4 bit; name the 16-bit model, or leave --lora_rank out"
        )


def _begin(work: Path, options: DropOptions) -> None:
    """Record in the work folder what is asked; raises ConfigError where it was begun with other
    flags: what is done there belongs to those."""
    asked = {
        **dataclasses.asdict(options.base),
        **dataclasses.asdict(options.plan),
        **dataclasses.asdict(options.adapter),
        **{name: getattr(options, name) for name in _LEARNING},
    }
    asked = json.loads(json.dumps(asked))  # as it will be read back
    file = work / RECORD
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, asked)
        return
    before = read_json(file)
    for name, value in asked.items():
        if name not in before:
            begun = f"by a version without --{name}"
        elif value != before[name]:
            begun = f"with --{name} {before[name]}, not {value}"
        else:
            continue
        raise ConfigError(
            f"{work} was begun {begun}; remove it, or name another folder with --work_dir"
        )


def _run(options: DropOptions, command: Sequence[str]) -> None:
    """Run a command of megaskip on as many ranks as are asked for."""
    ranks = [sys.executable, "-m", "megaskip"]
    if options.nproc > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node"]
        ranks = [sys.executable, "-m", *launcher, str(options.nproc), "-m", "megaskip"]
    _start([*ranks, *command])


def _start(command: Sequence[str]) -> None:
    logger.info("%s", shlex.join(command))
    if run_child(command):
        raise MegaskipError(
            f"a job failed, see above; the same command goes on there: {shlex.join(command)}"
        )


def _fit_flags(options: DropOptions) -> list[str]:
    return _flags(dataclasses.asdict(options.base) | dataclasses.asdict(options.plan))


def _train_flags(options: DropOptions, fitted: Path) -> list[str]:
    values = {
        "init_routers": fitted,
        "max_steps": options.steps,
        "gradient_accumulation_steps": options.batch_size // options.rows_at_once,
        "distill": options.distill,
        "compensation_lr": options.compensation_lr,
        "resume": "auto",
    }
    adapter = dataclasses.asdict(options.adapter) if options.adapter.lora_rank else {}
    return _flags(dataclasses.asdict(options.base) | values | adapter)


def _export_flags(options: DropOptions, work: Path) -> list[str]:
    base = options.base
    values: dict[str, object] = {"trust_remote_code": base.trust_remote_code}
    if options.steps:  # the run knows its tokenizer and template
        values |= {"run": work / "run", "merge": bool(options.adapter.lora_rank)}
    else:
        values |= {"routers": work / "fitted", "tokenizer": base.tokenizer}
        values |= {"chat_template": base.chat_template}
    return _flags(values)


def _flags(values: Mapping[str, object]) -> list[str]:
    """Return settings as flags: a switch where it is on, a list as a flag for each entry; what is
    None is left out."""
    flags: list[str] = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not None and value is not False:
            entries = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name}={entry}" for entry in entries]
    return flags
