"""Where a tool's routers, base model and text come from: a run of launch/train.py, or folders.

Shared by convert_to_hf.py, export_static.py, calibrate.py and compare.py.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import CONFIG
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config import DataConfig, ModelConfig
from megaskip.config.run import DEMO
from megaskip.errors import ConfigError
from megaskip.parallel.loading.source import DEMO_FOLDER, find_model_folder


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add --run, --routers and --base, which `sources` reads."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of launch/train.py; it knows its base and data")
    source.add_argument("--routers", help="router folder (routers.safetensors, router_config.json)")
    parser.add_argument("--base", help="base model, folder or hub id [what the routers name]")


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add --data, which `read_as` reads."""
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="calibration text, as --data of launch/train.py [that of --run]",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, which `read_as` reads."""
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        help="type of the base's weights in memory [that of --run; else as stored]",
    )


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """Add --tokenizer, which `chosen_tokenizer` reads."""
    parser.add_argument(
        "--tokenizer",
        help="tokenizer, folder or hub id [with --run: what it was trained with; else the base's]",
    )


def chosen_tokenizer(options: argparse.Namespace, base: Path) -> Any | None:
    """Return the tokenizer that is exported in place of the base's; None for the base's own."""
    return other_tokenizer(options.tokenizer, Path(options.run) if options.run else None, base)


def sources(options: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Return (router folder, base folder, facts for the model card)."""
    facts: dict[str, Any] = {}
    routers = Path(options.routers or Path(options.run) / "routers")
    if not (routers / CONFIG).is_file():
        raise ConfigError(f"{routers}: no {CONFIG} there; give a finished run or a router folder")
    recorded = read_json(routers / CONFIG).get("base_model") or {}
    name, revision = options.base, None
    if options.run:
        facts, recorded["name"] = run_facts(Path(options.run))
    if name is None:
        name, revision = recorded.get("name"), recorded.get("revision")
    if not name:
        raise ConfigError(f"{routers} does not name its base model; give --base")
    return routers, find_model_folder(ModelConfig(model=name, revision=revision)), facts


def run_facts(run: Path) -> tuple[dict[str, Any], str | None]:
    """Return (facts for the card, base model) of a run folder."""
    report = read_report(run)
    held_out, config = report.get("held_out", {}), report["config"]
    facts: dict[str, Any] = {"data": ", ".join(config["data"]["data"]), "steps": report["steps"]}
    if "loss_routed" in held_out:
        facts["held-out loss"] = (
            f"{held_out['loss_routed']:.4f} (dense {held_out['loss_dense']:.4f})"
        )
        facts["realised capacity, held out"] = f"{held_out['capacity']:.3f}"
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return facts, config["model"]["model"]


def read_as(options: argparse.Namespace, base: Path) -> tuple[DataConfig, ModelConfig]:
    """Return how text and model are read: as the run did, and --data in the place of its data."""
    data, model = DataConfig(), ModelConfig(model=str(base))
    if options.run:
        recorded = read_report(Path(options.run))["config"]
        lists = ("data", "eval_data")
        data = DataConfig(**recorded["data"] | {k: tuple(recorded["data"][k]) for k in lists})
        model = ModelConfig(**recorded["model"] | {"model": str(base)})
    elif not options.data:
        raise ConfigError("--routers names no calibration text; give --data PATH")
    if options.data:
        data = dataclasses.replace(data, data=tuple(options.data), eval_data=())
    if getattr(options, "dtype", None):
        model = dataclasses.replace(model, dtype=options.dtype)
    return data, model


def with_demo(data: DataConfig) -> DataConfig:
    """Replace the name "demo" by the path of the data that ship with megaskip."""
    pairs = [entry.partition(":") for entry in data.data]
    path = str(DEMO_FOLDER / "instruct.jsonl")
    entries = [path + "".join(e[1:]) if e[0] == DEMO else "".join(e) for e in pairs]
    return dataclasses.replace(data, data=tuple(entries))


def read_report(run: Path) -> dict[str, Any]:
    """Return the report of a run folder; raises ConfigError without one."""
    try:
        report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run}: cannot read its report.json ({error})") from None
    return report
