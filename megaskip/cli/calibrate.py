"""Let one set of routers serve many capacities: find the threshold of each on calibration text.

    python tools/calibrate.py --run runs/demo-attn_sequence-001 --capacity 0.8,0.6,0.4
    deepspeed tools/calibrate.py --routers my_routers --base path/to/base --data text.jsonl \\
        --capacity 0.75,0.5 --ds_config ds_configs/zero3.json --output calibrated

With --allocate 2 each layer gets its own threshold, so that the calibration text loses least: it
measures, twice, what skipping costs in each layer. For decisions per sequence.

The table goes into router_config.json, and with it into what tools/convert_to_hf.py writes; then
model.set_capacity(0.6) chooses. Routers that were trained with --capacity_low do this best.
"""

import argparse
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megaskip.calibration.allocation import require_rounds
from megaskip.calibration.capacities import (
    CalibratedCapacity,
    calibrate_all,
    routed_engine,
    with_points,
)
from megaskip.checkpoint.atomic import new_folder, why_unwritable
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import read_router_config, update_router_config
from megaskip.cli.source import add_dtype, add_source, add_text, read_as, sources, with_demo
from megaskip.config import DataConfig, ModelConfig, OptimConfig, ParallelConfig, RunConfig
from megaskip.data import build_dataset
from megaskip.data.loader import DataLoader
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.export.folder import require_new
from megaskip.log import quiet_libraries, set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.progress import ProgressBatches
from megaskip.reporting.summary import table


def main(argv: Sequence[str]) -> None:
    """Calibrate, write the table and print it. Every rank calls it."""
    options = parse(argv)
    capacities = listed(options.capacity)
    topology = read_topology(os.environ)
    set_up_logging(rank=topology.rank)
    quiet_libraries()
    routers, base, _ = sources(options)
    output = Path(options.output) if options.output else routers
    if output.resolve() != routers.resolve():
        require_new(output)
    if why := why_unwritable(output):
        raise ConfigError(f"--output {output}: cannot write there ({why}); name another folder")
    stored, _, described = read_router_config(routers)
    require_rounds(stored, options.allocate)
    if described is not None:
        described.require(describe_folder(base), "the router folder")
    if options.ds_config is not None:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    data, model = read_as(options, base)
    if options.eval_data:
        data = dataclasses.replace(data, eval_data=tuple(options.eval_data))
    config = RunConfig(
        model=model,
        data=data,
        optim=OptimConfig(micro_batch_size=options.micro_batch_size),
        parallel=ParallelConfig(ds_config=options.ds_config),
    )
    loader = loader_of(data, model, base, topology, options, stored.prompt_tokens)
    held_out = loader.held_out()
    if not held_out:
        raise ConfigError(
            "no text is held out to check the capacities on; give --eval_data, or more --data"
        )
    hidden = None if topology.is_first else True
    total = len(capacities) * (1 + options.allocate)
    with (
        process_group(topology, timeout=config.parallel.dist_timeout),
        tqdm(total=total, desc="calibrating", disable=hidden) as bar,
    ):
        engine = routed_engine(config, topology, resolve_source(model), routers)
        calibration = ProgressBatches(loader.calibration(options.rows), "a pass", disable=hidden)
        result = calibrate_all(
            engine,
            calibration,
            held_out,
            capacities,
            rounds=options.allocate,
            progress=bar.update,
        )
        points = result.points
        dense = engine.evaluate(held_out, routed=False).loss
        if topology.is_first and points:
            title = f"calibrated: {output} (held-out loss, dense: {dense:.4f})"
            rows = [row(point, allocated=options.allocate > 0) for point in points]
            print("\n".join(table(rows, title=title)))
        if points:
            on_first_rank(topology, lambda: write(routers, output, with_points(stored, points)))
    result.require_all()


def loader_of(
    data: DataConfig,
    model: ModelConfig,
    base: Path,
    topology: Topology,
    options: argparse.Namespace,
    prompt_tokens: int,
) -> DataLoader:
    """Return the text to calibrate on, as training reads it."""
    tokenizer = load_tokenizer(model.tokenizer or base, trust_remote_code=model.trust_remote_code)
    return DataLoader(
        data=build_dataset(with_demo(data), tokenizer),
        rank=topology.rank,
        world_size=topology.world_size,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.micro_batch_size * topology.world_size,
        seed=data.seed,
        pad_token_id=tokenizer.pad_token_id,
        prompt_tokens=prompt_tokens,
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    parser.add_argument("--capacity", required=True, help="shares to keep, such as 0.8,0.6,0.4")
    add_text(parser)
    parser.add_argument(
        "--eval_data",
        action="append",
        metavar="PATH",
        help="text on which the capacities are checked [carved off the calibration text]",
    )
    add_dtype(parser)
    parser.add_argument("--rows", type=int, default=4096, help="rows to calibrate on [4096]")
    parser.add_argument(
        "--allocate",
        type=int,
        default=0,
        metavar="ROUNDS",
        help="give each layer its own threshold, in so many rounds, each of a forward pass a layer "
        "over --rows; 2 are enough [0: all alike]",
    )
    parser.add_argument("--micro_batch_size", type=int, default=4, help="as in training [4]")
    parser.add_argument("--ds_config", help="DeepSpeed JSON that owns sharding, as in training")
    parser.add_argument("--output", help="folder to write [the router folder itself]")
    # The deepspeed launcher adds it; the rank itself comes from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows} must be at least 1")
    return options


def listed(text: str) -> list[float]:
    """Return the capacities in `text`; raises ConfigError unless all are shares."""
    try:
        capacities = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--capacity {text!r}: expected shares such as 0.8,0.6,0.4") from None
    outside = [capacity for capacity in capacities if not 0 < capacity < 1]
    if outside:
        raise ConfigError(f"--capacity {outside[0]:g} must lie inside (0, 1): 1 is the base model")
    return sorted(set(capacities))


def write(routers: Path, output: Path, config: object) -> Path:
    """Put the calibrated settings where they are asked for."""
    if output.resolve() != routers.resolve():
        with new_folder(output) as folder:
            shutil.copytree(routers, folder, dirs_exist_ok=True)
    update_router_config(output, config)  # type: ignore[arg-type]
    return output


def row(point: CalibratedCapacity, *, allocated: bool) -> tuple[str, str]:
    """Return a row of the closing table."""
    alike = allocated and isinstance(point.threshold, float)
    why = " for all layers, for no allocation was better by more than chance" if alike else ""
    realised = f"{point.held_out:.4f} held out (standard error {point.held_out_error:.4f})"
    return (
        f"capacity {point.capacity:g}",
        f"{realised}, {point.kept:.4f} calibrated, loss {point.loss:.4f}, "
        f"threshold {point.described}{why}",
    )
