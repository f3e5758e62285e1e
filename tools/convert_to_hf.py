"""Turn a trained run into a Hugging Face folder that loads with torch and transformers alone.

    python tools/convert_to_hf.py --run runs/demo-attn_sequence-001 --output exported --verify
    python tools/convert_to_hf.py --routers my_routers --base path/to/base --output exported

overlay (default) hard-links the base's shards, so that a 70B takes a second; copy stands by itself;
adapter holds the routers alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone

from tqdm import tqdm

from megaskip.checkpoint.atomic import read_json
from megaskip.checkpoint.routers import CONFIG
from megaskip.config import ModelConfig
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.folder import MODES, Exported, export_folder
from megaskip.export.verify import verify_folder
from megaskip.inference.flow import KV_CHOICES
from megaskip.job import run_cli
from megaskip.log import quiet_libraries
from megaskip.parallel.load import find_model_folder
from megaskip.reporting.summary import human_bytes, table


def main(argv: Sequence[str]) -> None:
    """Convert and say what was written."""
    options = parse(argv)
    quiet_libraries()
    routers, base, facts = sources(options)
    begun = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc="base weights", disable=None) as bar:
        done = export_folder(
            routers,
            base,
            Path(options.output),
            mode=options.mode,
            kv=options.kv,
            facts=facts,
            progress=bar.update,
        )
    rows = summary(done, time.monotonic() - begun)
    verified = None
    if options.verify:
        if options.mode == "adapter":
            raise ConfigError("--verify loads a whole folder; an adapter is loaded with its base")
        verified = verify_folder(done.folder, base, routers)
        difference = f"{verified.difference:.1e} over {verified.tokens} tokens"
        rows.append(("verified", f"fresh process, fp32: logits differ by at most {difference}"))
    print("\n".join(table(rows, title=f"exported: {done.folder}")))
    if verified is not None and not verified.passed:
        raise CheckpointError(
            f"{done.folder}: its logits differ by {verified.difference:.1e} from the trained "
            f"model's, whose largest is {verified.scale:.1e}; do not use this folder"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder of launch/train.py; it knows its base model")
    source.add_argument("--routers", help="router folder (routers.safetensors, router_config.json)")
    parser.add_argument("--base", help="base model, folder or hub id [what the routers name]")
    parser.add_argument("--output", required=True, help="new folder to write")
    parser.add_argument("--mode", default="overlay", choices=MODES, help="[overlay]")
    parser.add_argument(
        "--kv",
        default="keep",
        choices=KV_CHOICES,
        help="token units: skipped tokens are still attended to (keep, as trained) or not (drop, "
        "which saves their keys and values) [keep]",
    )
    parser.add_argument(
        "--verify", action="store_true", help="load it in a fresh process and compare logits"
    )
    return parser.parse_args(argv)


def sources(options: argparse.Namespace) -> tuple[Path, Path, dict[str, Any]]:
    """Return (router folder, base folder, facts for the model card)."""
    facts: dict[str, Any] = {}
    routers = Path(options.routers or Path(options.run) / "routers")
    if not (routers / CONFIG).is_file():
        raise ConfigError(f"{routers}: no {CONFIG} there; give a finished run or a router folder")
    name = options.base
    if options.run:
        facts, recorded = run_facts(Path(options.run))
        name = name or recorded
    if name is None:
        name = (read_json(routers / CONFIG).get("base_model") or {}).get("name")
    if not name:
        raise ConfigError(f"{routers} does not name its base model; give --base")
    return routers, find_model_folder(ModelConfig(model=name)), facts


def run_facts(run: Path) -> tuple[dict[str, Any], str | None]:
    """Return (facts for the card, base model) of a run folder."""
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run {run}: cannot read its report.json ({error})") from None
    held_out, config = report.get("held_out", {}), report["config"]
    facts: dict[str, Any] = {"data": ", ".join(config["data"]["data"]), "steps": report["steps"]}
    if "loss_routed" in held_out:
        facts["held-out loss"] = (
            f"{held_out['loss_routed']:.4f} (dense {held_out['loss_dense']:.4f})"
        )
        facts["realised capacity, held out"] = f"{held_out['capacity']:.3f}"
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    return facts, config["model"]["model"]


def summary(done: Exported, seconds: float) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    return [
        ("mode", "; ".join([done.mode, *done.notes])),
        ("written", f"{human_bytes(done.written)} in {seconds:.2f} s"),
        ("shared with the base", human_bytes(done.linked)),
        ("load", "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"),
    ]


if __name__ == "__main__":
    run_cli(main)
