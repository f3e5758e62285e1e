"""Trained routers, their base model and their text, found from a run folder or a router folder."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import CONFIG, read_router_config, why_no_routers
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config import DataConfig, ModelConfig
from megaskip.config.commands.source import RouterSource, TextSource
from megaskip.config.stored import stored_settings, stored_value
from megaskip.data.dataset import data_for_model
from megaskip.data.loader import DataLoader
from megaskip.data.template import read_template
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import CheckpointError, ConfigError
from megaskip.parallel.loading.source import ModelSource, find_model_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRouters:
    """Trained routers on disk, and the model that they were trained on."""

    folder: Path
    base: Path
    facts: dict[str, Any]
    """Of the run, for a model card; empty without a run folder."""


def find_routers(source: RouterSource) -> TrainedRouters:
    """Return the routers that `source` names; raises ConfigError when they, or their base, are not
    there."""
    facts: dict[str, Any] = {}
    folder = source.routers or Path(source.run or "") / "routers"
    if not (folder / CONFIG).is_file():
        named = source.routers or Path(source.run or "")
        raise ConfigError(f"{named}: {why_no_routers(named)}")
    described = read_router_config(folder)[2]
    recorded = described.name if described is not None else None
    name, revision = source.base, None
    if source.run is not None:
        facts, recorded = run_facts(source.run)
    if name is None:
        name, revision = recorded, described.revision if described is not None else None
    if not name:
        raise ConfigError(f"{folder} does not name its base model; give --base")
    base = find_model_folder(ModelConfig(model=name, revision=revision))
    return TrainedRouters(folder=folder, base=base, facts=facts)


def chosen_tokenizer(
    named: str | None, source: RouterSource, base: Path, *, template: str | None = None
) -> Any | None:
    """Return the tokenizer that is exported in place of the base's; None for the base's own.

    `template` is a file with the chat template that it is to have.
    """
    trusted = source.trust_remote_code
    tokenizer = other_tokenizer(named, source.run, base, trust_remote_code=trusted)
    if template is not None:
        text = read_template(template)
        if tokenizer is None:
            tokenizer = load_tokenizer(base, trust_remote_code=trusted)
        tokenizer.chat_template = text
    return tokenizer


def run_facts(run: Path) -> tuple[dict[str, Any], str | None]:
    """Return (facts for the card, base model) of a run folder."""
    report = read_report(run)

    def recorded(path: str, hint: Any) -> Any:
        return stored_value(report, path, hint, f"--run {run}: report.json")

    data = recorded("config.data.data", tuple[str, ...])
    facts: dict[str, Any] = {"data": ", ".join(data), "steps": recorded("steps", int)}
    held_out = recorded("held_out", dict[str, Any] | None) if "held_out" in report else None
    if "loss_routed" in (held_out or {}):
        routed, dense, capacity = (
            recorded(f"held_out.{name}", float)
            for name in ("loss_routed", "loss_dense", "capacity")
        )
        facts["held-out loss"] = f"{routed:.4f} (dense {dense:.4f})"
        facts["realised capacity, held out"] = f"{capacity:.3f}"
    versions = recorded("versions", Mapping[str, str])
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    return facts, recorded("config.model.model", str)


def read_report(run: Path) -> dict[str, Any]:
    """Return the report of a run folder; raises ConfigError without one."""
    try:
        return read_json(run / "report.json")
    except CheckpointError as error:
        raise ConfigError(f"--run {run}: {error}; give a finished run") from None


def trained_base_dtype(run: Path) -> str:
    """Return the --base_dtype of a run; that of runs from before there was one is "dtype"."""
    model = read_report(run).get("config", {}).get("model", {})
    return str(model.get("base_dtype", "dtype"))


# -- the text


def read_as(source: RouterSource, text: TextSource, base: Path) -> tuple[DataConfig, ModelConfig]:
    """Return how text and model are read: as the run did, with --data in place of its data."""
    data, model = DataConfig(), ModelConfig(model=str(base))
    if source.run is not None:
        data, model = _settings_of(source.run)
        if model.trust_remote_code and not source.trust_remote_code:
            raise ConfigError(
                f"--run {source.run} was trained with --trust_remote_code; give it here, too, if "
                f"code that comes with {base} may run"
            )
        model = dataclasses.replace(model, model=str(base))
    elif not text.data:
        raise ConfigError("--routers names no calibration text; give --data PATH")
    model = dataclasses.replace(model, trust_remote_code=source.trust_remote_code)
    if text.data:
        data = dataclasses.replace(data, data=text.data, eval_data=())
    if text.seq_length is not None:
        data = dataclasses.replace(data, seq_length=text.seq_length)
    if text.dtype is not None:
        model = dataclasses.replace(model, dtype=text.dtype)
    return data, model


def _settings_of(run: Path) -> tuple[DataConfig, ModelConfig]:
    """Return the settings that a run was trained with."""
    report, origin = read_report(run), f"--run {run}: report.json, config"
    sections = stored_value(report, "config", dict, origin)
    data = stored_settings(DataConfig, sections.get("data"), f"{origin}.data")
    return data, stored_settings(ModelConfig, sections.get("model"), f"{origin}.model")


def open_text(
    data: DataConfig,
    model: ModelConfig,
    source: ModelSource,
    *,
    prompt_tokens: int,
    micro_batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    tokenizer: Any | None = None,
) -> DataLoader:
    """Return the text to calibrate on, as training reads it; every rank gets its own rows.

    `tokenizer` is that of the model, where it is loaded already. Raises DataError or ConfigError.
    No rank waits for another.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(
            model.tokenizer or source.folder, trust_remote_code=model.trust_remote_code
        )
    tokenized, pad_token_id = data_for_model(data, tokenizer, source.text_config.vocab_size)
    return DataLoader(
        data=tokenized,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * world_size,
        seed=data.seed,
        pad_token_id=pad_token_id,
        prompt_tokens=prompt_tokens,
    )
