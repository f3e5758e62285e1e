"""The job of `megaskip calibrate`: find thresholds, check them on held-out text, store them."""

import dataclasses
import os
import shutil
from pathlib import Path

from tqdm import tqdm

from megaskip.calibration.allocation import require_rounds
from megaskip.calibration.capacities import (
    CalibratedCapacity,
    CalibrationResult,
    calibrate_all,
    routed_engine,
    with_points,
)
from megaskip.checkpoint.atomic import new_folder
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import read_router_config, update_router_config
from megaskip.config import OptimConfig, ParallelConfig, RouterConfig, RunConfig
from megaskip.config.commands.calibrate import CalibrateOptions
from megaskip.config.paths import why_unwritable
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError
from megaskip.export.folder import require_new
from megaskip.log import quiet_libraries, set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.progress import ProgressBatches
from megaskip.reporting.summary import table
from megaskip.runs.source import TrainedRouters, find_routers, open_text, read_as


def calibrate(options: CalibrateOptions) -> None:
    """Calibrate, write the table and print it. Every rank calls it."""
    topology = read_topology(os.environ)
    set_up_logging(rank=topology.rank)
    quiet_libraries()
    routers = find_routers(options.source)
    output = _output(options, routers)
    stored, _, described = read_router_config(routers.folder)
    require_rounds(stored, options.allocate)
    if described is not None:
        described.require(describe_folder(routers.base), "the router folder")
    if options.ds_config is not None:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    config = _run_config(options, routers)
    loader = open_text(
        config.data,
        config.model,
        routers.base,
        prompt_tokens=stored.prompt_tokens,
        micro_batch_size=options.micro_batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
    )
    if not len(loader.data.held_out):
        raise ConfigError(
            "no text is held out to check the capacities on; give --eval_data, or more --data"
        )
    with process_group(topology, timeout=config.parallel.dist_timeout):
        result, dense = _search(options, config, topology, routers, loader)
        points = result.points
        if topology.is_first and points:
            title = f"calibrated: {output} (held-out loss, dense: {dense:.4f})"
            rows = [_row(point, allocated=options.allocate > 0) for point in points]
            print("\n".join(table(rows, title=title)))
        if points:
            updated = with_points(stored, points)
            on_first_rank(topology, lambda: _write(routers.folder, output, updated))
    result.require_all()


def _output(options: CalibrateOptions, routers: TrainedRouters) -> Path:
    """Return the folder to write; raises ConfigError when it cannot be written."""
    output = options.output or routers.folder
    if output.resolve() != routers.folder.resolve():
        require_new(output)
    if why := why_unwritable(output):
        raise ConfigError(f"--output {output}: cannot write there ({why}); name another folder")
    return output


def _run_config(options: CalibrateOptions, routers: TrainedRouters) -> RunConfig:
    data, model = read_as(options.source, options.text, routers.base)
    if options.eval_data:
        data = dataclasses.replace(data, eval_data=options.eval_data)
    return RunConfig(
        model=model,
        data=data,
        optim=OptimConfig(micro_batch_size=options.micro_batch_size),
        parallel=ParallelConfig(ds_config=options.ds_config),
    )


def _search(
    options: CalibrateOptions,
    config: RunConfig,
    topology: Topology,
    routers: TrainedRouters,
    loader: DataLoader,
) -> tuple[CalibrationResult, float]:
    """Return (what came of each capacity, dense held-out loss). Collective."""
    held_out = loader.held_out()
    capacities = sorted(set(options.capacity))
    hidden = None if topology.is_first else True
    total = len(capacities) * (1 + options.allocate)
    with tqdm(total=total, desc="calibrating", disable=hidden) as bar:
        engine = routed_engine(config, topology, resolve_source(config.model), routers.folder)
        calibration = ProgressBatches(loader.calibration(options.rows), "a pass", disable=hidden)
        result = calibrate_all(
            engine,
            calibration,
            held_out,
            capacities,
            rounds=options.allocate,
            progress=bar.update,
        )
        return result, engine.evaluate(held_out, routed=False).loss


def _write(routers: Path, output: Path, config: RouterConfig) -> None:
    """Put the calibrated settings where they are asked for."""
    if output.resolve() != routers.resolve():
        with new_folder(output) as folder:
            shutil.copytree(routers, folder, dirs_exist_ok=True)
    update_router_config(output, config)


def _row(point: CalibratedCapacity, *, allocated: bool) -> tuple[str, str]:
    """Return a row of the closing table."""
    alike = allocated and isinstance(point.threshold, float)
    why = " for all layers, for no allocation was better by more than chance" if alike else ""
    realised = f"{point.held_out:.4f} held out (standard error {point.held_out_error:.4f})"
    return (
        f"capacity {point.capacity:g}",
        f"{realised}, {point.kept:.4f} calibrated, loss {point.loss:.4f}, "
        f"threshold {point.described}{why}",
    )
