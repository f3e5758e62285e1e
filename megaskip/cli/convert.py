"""Turn a trained run into a Hugging Face folder that loads with torch and transformers alone.

    python tools/convert_to_hf.py --run runs/demo-attn_sequence-001 --output exported --verify
    python tools/convert_to_hf.py --routers my_routers --base path/to/base --output exported

overlay (default) hard-links the base's shards, so that a 70B takes a second; copy stands by itself;
adapter holds the routers alone.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megaskip.cli.source import add_source, add_tokenizer, chosen_tokenizer, sources
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.folder import MODES, Exported, export_folder
from megaskip.export.verify import verify_folder
from megaskip.inference.executor import KV_CHOICES
from megaskip.log import quiet_libraries
from megaskip.reporting.summary import human_bytes, table


def main(argv: Sequence[str]) -> None:
    """Convert and say what was written."""
    options = parse(argv)
    quiet_libraries()
    routers, base, facts = sources(options)
    tokenizer = chosen_tokenizer(options, base)
    begun = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc="base weights", disable=None) as bar:
        done = export_folder(
            routers,
            base,
            Path(options.output),
            mode=options.mode,
            kv=options.kv,
            tokenizer=tokenizer,
            facts=facts,
            progress=bar.update,
        )
    rows = summary(done, time.monotonic() - begun)
    verified = None
    if options.verify:
        verified = verify_folder(done.folder, base, routers)
        difference = f"{verified.difference:.1e} over {verified.tokens} tokens"
        rows.append(("verified", f"fresh process, fp32: logits differ by at most {difference}"))
    print("\n".join(table(rows, title=f"exported: {done.folder}")))
    if verified is not None and not verified.passed:
        raise CheckpointError(verified.explain(done.folder))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    add_tokenizer(parser)
    parser.add_argument("--output", required=True, help="new folder to write")
    parser.add_argument("--mode", default="overlay", choices=MODES, help="[overlay]")
    parser.add_argument(
        "--kv",
        default="keep",
        choices=KV_CHOICES,
        help="attn_token, block_token: skipped tokens are still attended to (keep, as trained) or "
        "not (drop, which saves their keys and values) [keep]",
    )
    parser.add_argument(
        "--verify", action="store_true", help="load it in a fresh process and compare logits"
    )
    options = parser.parse_args(argv)
    if options.verify and options.mode == "adapter":
        raise ConfigError("--verify loads a whole folder; an adapter is loaded with its base")
    return options


def summary(done: Exported, seconds: float) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    load = "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    if done.mode == "adapter":
        load = "megaskip.load_routers(model, folder) on the loaded base"
    return [
        ("mode", "; ".join([done.mode, *done.notes])),
        ("written", f"{human_bytes(done.written)} in {seconds:.2f} s"),
        ("shared with the base", human_bytes(done.linked)),
        ("load", load),
    ]
