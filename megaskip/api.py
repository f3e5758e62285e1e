"""What users call from Python, beside attaching, saving and loading routers.

Each function does what the command of its name does, without printing, and returns the result. They
work in one process, without a process group; where one is open every rank calls them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from megaskip.calibration.capacities import CalibrationResult
from megaskip.calibration.job import CalibrationJob
from megaskip.config.commands.calibrate import CalibrateOptions
from megaskip.config.commands.convert import ConvertOptions
from megaskip.config.commands.export_static import ExportStaticOptions
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.errors import ConfigError
from megaskip.export.folder import Exported
from megaskip.export.job import write_converted
from megaskip.export.static_folder import StaticExport
from megaskip.export.static_job import drop_and_export
from megaskip.export.verify import verify_folder
from megaskip.parallel.inference import InferenceModel, Placement
from megaskip.parallel.inference import load_for_inference as load_placed
from megaskip.parallel.topology import current_topology
from megaskip.runs.source import find_routers


def load_for_inference(
    model: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str = "auto",
) -> InferenceModel:
    """Return a model that skips what its routers skip: prefill and decode compute no more.

    `model` is a folder that `convert` or `export_static` wrote, a run folder, a router folder, or a
    plain Hugging Face model (a folder or hub id, then without routers). `base` is the base model of
    a router folder, when it is not the one that the folder names. `device` is a GPU where there is
    one, else the CPU. `dtype` is "auto" (as stored), "float32" or "bfloat16".

    The result has the Hugging Face model as `model`, in evaluation mode and frozen, its `routers`
    (None for a dense model) and the `folder` of its tokenizer. Raises ConfigError or
    CheckpointError for a folder that is none of these, or is damaged.
    """
    placement = Placement.on(current_topology().device if device is None else torch.device(device))
    return load_placed(str(model), placement, dtype=dtype, base=None if base is None else str(base))


def convert(
    routers: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    mode: str = "overlay",
    kv: str = "keep",
    merge: bool = False,
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = False,
) -> Exported:
    """Write a Hugging Face folder that loads without megaskip; return what was written.

    `routers` is a run folder or a router folder; `base` is its base model, when it is not the one
    that it names. `output` must be new. `mode` is "overlay" (hard links to the base's weights),
    "copy" (a folder that stands by itself) or "adapter" (the routers alone). With `kv` "drop",
    tokens that skip an attention hold no keys and values there (decisions per token only).
    An adapter that was trained with the routers is written beside them, as adapter/ for peft, or
    with `merge` added to the weights.
    `tokenizer`, a folder or hub id, takes the place of the run's, or of the base's; code that it
    brings along runs with `trust_remote_code` only. `verify` loads
    the folder in a fresh process and compares its logits and routers with the trained ones.

    Raises ConfigError for what cannot be written and CheckpointError for damaged files or logits
    that differ.
    """
    options = ConvertOptions(
        source=_router_source(routers, base, trust_remote_code),
        tokenizer=tokenizer,
        output=Path(output),
        mode=mode,
        kv=kv,
        merge=merge,
        verify=verify,
    )
    trained = find_routers(options.source)
    done = write_converted(options, trained)
    if verify:
        verify_folder(done.folder, trained.base, trained.folder).require(done.folder)
    return done


def export_static(
    routers: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    below: float | None = None,
    count: int | None = None,
    layers: str | Sequence[int] | None = None,
    data: Sequence[str | Path] = (),
    rows: int = 256,
    form: str = "hf",
    without_compensation: bool = False,
    merge: bool = False,
    tokenizer: str | None = None,
    chat_template: str | Path | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    seq_length: int | None = None,
    verify: bool = False,
) -> StaticExport:
    """Write a model without the sublayers that its routers seldom let run, for servers that cannot
    route; return what was written.

    `routers`, `base`, `output`, `tokenizer` and `trust_remote_code` are as in `convert`. What is
    dropped is said in exactly one way: every routed sublayer whose measured capacity is `below` a
    share, the `count` lowest ones, or those of `layers`. Routers of a static budget (those of
    `megaskip fit` and of runs that start from them) need none of the three: their layers never run,
    and all of them are dropped. Capacities are measured on `rows` rows of `data` (files, folders or
    hub names as `megaskip train` reads them; the text of the run for a run folder), of `seq_length`
    tokens at most.
    `form` is "hf" for transformers or "decilm" for vLLM. Maps that routers have for what they skip
    stand in the place of what is dropped; `without_compensation` leaves them out, as "decilm"
    needs. `merge` adds a LoRA adapter of the routers to the weights that stay. `chat_template`, a
    jinja file, takes the place of the tokenizer's. `dtype` is the type of the weights while it is
    measured. `verify` compares logits with those of the base whose sublayers are off.

    Raises ConfigError, DataError, CheckpointError or UnsupportedModelError.
    """
    spec = layers if layers is None or isinstance(layers, str) else ",".join(map(str, layers))
    options = ExportStaticOptions(
        source=_router_source(routers, base, trust_remote_code),
        text=TextSource(data=tuple(map(str, data)), dtype=dtype, seq_length=seq_length),
        tokenizer=tokenizer,
        chat_template=None if chat_template is None else str(chat_template),
        rows=rows,
        below=below,
        count=count,
        layers=spec,
        format=form,
        without_compensation=without_compensation,
        merge=merge,
        output=Path(output),
        verify=verify,
    )
    outcome = drop_and_export(options)
    outcome.require_verified()
    return outcome.done


def calibrate(
    routers: str | Path,
    capacities: Sequence[float],
    *,
    data: Sequence[str | Path] = (),
    eval_data: Sequence[str | Path] = (),
    base: str | Path | None = None,
    rows: int = 4096,
    allocate: int = 0,
    micro_batch_size: int = 4,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    seq_length: int | None = None,
    output: str | Path | None = None,
) -> CalibrationResult:
    """Find the thresholds at which trained routers keep each of `capacities`, and store them.

    `routers`, `base` and `trust_remote_code` are as in `convert`. Thresholds are found on `rows`
    rows of `data` (files, folders or hub names as `megaskip train` reads them; the text of the run
    for a run folder), of `seq_length` tokens at most, and checked on `eval_data`, or on text that
    is held out of `data`. With `allocate` rounds (2 are enough) every layer gets its own threshold,
    so that less is lost; for decisions per sequence. They are written into the router folder, or
    into the new folder `output`; then `routers.set_capacity(0.6)`, or that of an exported model,
    chooses.

    The result has a point for every capacity that the routers keep, and a text in `problems` for
    every other; `require_all()` makes an error of them. Collective where a process group is open.
    Raises ConfigError, DataError or CheckpointError.
    """
    options = CalibrateOptions(
        source=_router_source(routers, base, trust_remote_code),
        capacity=tuple(capacities),
        text=TextSource(data=tuple(map(str, data)), dtype=dtype, seq_length=seq_length),
        eval_data=tuple(map(str, eval_data)),
        rows=rows,
        allocate=allocate,
        micro_batch_size=micro_batch_size,
        output=None if output is None else Path(output),
    )
    job = CalibrationJob(options, current_topology(), shows_progress=False)
    result = job.search()
    job.write(result)
    return result


def _router_source(
    routers: str | Path, base: str | Path | None, trust_remote_code: bool
) -> RouterSource:
    """Return the source of a run folder or a router folder; raises ConfigError for another one."""
    folder, name = Path(routers), None if base is None else str(base)
    if (folder / "report.json").is_file():
        return RouterSource(run=folder, base=name, trust_remote_code=trust_remote_code)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give a finished run or a router folder")
    return RouterSource(routers=folder, base=name, trust_remote_code=trust_remote_code)
