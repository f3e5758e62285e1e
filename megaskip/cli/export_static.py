"""Drop for good what trained routers seldom let run, for servers that cannot route.

    python tools/export_static.py --run runs/demo-attn_sequence-001 --below 0.35 --output small
    python tools/export_static.py --routers my_routers --base path/to/base --data text.jsonl \\
        --count 8 --format decilm --output small

The capacity of each layer is measured on calibration text. --format hf loads with transformers,
decilm in vLLM (llama and mistral bases). Shards that lose nothing are hard links to the base's.
"""

import argparse
import math
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import load_routers, read_router_config
from megaskip.cli.source import (
    add_dtype,
    add_source,
    add_text,
    add_tokenizer,
    chosen_tokenizer,
    read_as,
    sources,
    with_demo,
)
from megaskip.config import resolve_layers
from megaskip.data import build_dataset
from megaskip.data.loader import DataLoader
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import CheckpointError, ConfigError
from megaskip.export.static import choose_dropped, describe_dropped, measure_capacity, sublayers
from megaskip.export.static_folder import (
    FORMATS,
    StaticExport,
    export_static,
    require_exportable,
    verify_static,
)
from megaskip.log import quiet_libraries
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.whole import load_whole
from megaskip.reporting.summary import human_bytes, table


def main(argv: Sequence[str]) -> None:
    """Measure, choose, export and say what was done."""
    options = parse(argv)
    quiet_libraries()
    routers, base, _ = sources(options)
    config, routed, described = read_router_config(routers)
    if described is not None:
        described.require(describe_folder(base), "the router folder")
    tokenizer = chosen_tokenizer(options, base)
    require_exportable(base, Path(options.output), options.format)
    listed, unmeasured = listed_layers(options.layers, base), dict.fromkeys(routed, math.nan)
    if listed is not None:
        choose_dropped(unmeasured, layers=listed)
    capacity, text = measured(options, routers, base) or (unmeasured, "not measured")
    layers = choose_dropped(capacity, below=options.below, count=options.count, layers=listed)
    dropped = sublayers(config.target, layers)
    begun = time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc="base weights", disable=None) as bar:
        done = export_static(
            base,
            Path(options.output),
            dropped,
            form=options.format,
            name=described.name if described is not None else "",
            tokenizer=tokenizer,
            facts={"capacity per layer": capacity_text(capacity, ()), "measured on": text},
            progress=bar.update,
        )
    rows = summary(done, dropped, capacity, text, time.monotonic() - begun)
    verified = verify_static(done.folder, base, config.target, layers) if options.verify else None
    if verified is not None:
        difference = f"differ by at most {verified.difference:.1e} over {verified.tokens} tokens"
        rows.append(("verified", f"fresh process, fp32, against the forced base: {difference}"))
    print("\n".join(table(rows, title=f"exported: {done.folder}")))
    if verified is not None and not verified.passed:
        raise CheckpointError(
            f"{done.folder}: its logits differ by {verified.difference:.1e} from those of the base "
            f"with the same sublayers forced off (largest {verified.scale:.1e}); do not use "
            "this folder"
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    add_tokenizer(parser)
    add_text(parser)
    add_dtype(parser)
    parser.add_argument("--rows", type=int, default=256, help="rows of it to measure on [256]")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--below", type=float, help="drop what runs less often, a share, e.g. 0.3")
    way.add_argument("--count", type=int, help="drop so many, those that run least")
    way.add_argument("--layers", help="drop these, e.g. 4,5; measured only if --data is given")
    parser.add_argument("--format", default="hf", choices=FORMATS, help="[hf]")
    parser.add_argument("--output", required=True, help="new folder to write")
    parser.add_argument(
        "--verify", action="store_true", help="load it in a fresh process and compare logits (hf)"
    )
    options = parser.parse_args(argv)
    if options.verify and options.format != "hf":
        raise ConfigError(
            "--verify loads the folder with transformers, which has no DeciLM; use hf"
        )
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows} must be at least 1")
    return options


def listed_layers(text: str | None, base: Path) -> tuple[int, ...] | None:
    """Return the layers of --layers; a single number is that layer."""
    if text is None:
        return None
    # A comma makes a list of a number, which alone would be a count.
    return resolve_layers(f"{text},", describe_folder(base).num_layers)


def measured(
    options: argparse.Namespace, routers: Path, base: Path
) -> tuple[dict[int, float], str] | None:
    """Return (capacity by routed layer, the text it was measured on), when it is asked for."""
    if options.layers is not None and not options.data:
        return None
    data, settings = read_as(options, base)
    trust = settings.trust_remote_code
    tokenizer = load_tokenizer(settings.tokenizer or base, trust_remote_code=trust)
    loader = DataLoader(
        data=build_dataset(with_demo(data), tokenizer),
        rank=0,
        world_size=1,
        micro_batch_size=4,
        global_batch_size=4,
        seed=data.seed,
        pad_token_id=tokenizer.pad_token_id,
        prompt_tokens=read_router_config(routers)[0].prompt_tokens,
    )
    batches = [batch for batch in loader.calibration(options.rows) if batch is not None]
    rows = sum(len(batch.input_ids) for batch in batches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_whole(resolve_source(settings), device).eval()
    shares = measure_capacity(model, load_routers(model, routers), batches)
    return shares, f"{rows} rows of {', '.join(data.data)}"


def summary(
    done: StaticExport,
    dropped: Mapping[str, Sequence[int]],
    capacity: Mapping[int, float],
    text: str,
    seconds: float,
) -> list[tuple[str, str]]:
    """Return the rows of the closing table."""
    gone = {layer for layers in dropped.values() for layer in layers}
    return [
        ("dropped", describe_dropped(dropped)),
        ("capacity per layer", capacity_text(capacity, gone)),
        ("measured on", text),
        ("dropped weights", human_bytes(done.removed)),
        ("written", f"{human_bytes(done.written)} in {seconds:.2f} s"),
        ("shared with the base", "; ".join([human_bytes(done.linked), *done.notes])),
    ]


def capacity_text(capacity: Mapping[int, float], gone: Collection[int]) -> str:
    """Return capacity by layer in one line, with a mark at those that are dropped."""
    shares = {layer: "-" if math.isnan(c) else f"{c:.3f}" for layer, c in capacity.items()}
    return "  ".join(f"{i}: {text}{' (gone)' if i in gone else ''}" for i, text in shares.items())
