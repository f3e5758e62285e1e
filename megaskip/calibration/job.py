"""The job of `megaskip calibrate`: find thresholds, check them on held-out text, store them."""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from megaskip.calibration.allocation import require_rounds
from megaskip.calibration.capacities import (
    CalibratedCapacity,
    CalibrationResult,
    calibrate_all,
    routed_engine,
    with_points,
)
from megaskip.calibration.equal_scores import decide_as_before
from megaskip.calibration.expert_load import ExpertLoad, measure_load, write_loads
from megaskip.checkpoint.atomic import new_folder
from megaskip.checkpoint.base import describe_folder
from megaskip.checkpoint.routers import (
    read_router_config,
    update_router_config,
    update_router_weights,
)
from megaskip.config import OptimConfig, ParallelConfig, RouterConfig, RunConfig
from megaskip.config.commands.calibrate import CalibrateOptions
from megaskip.config.paths import require_new, why_unwritable
from megaskip.config.routing import UNDECIDED
from megaskip.data import Batch
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError
from megaskip.log import set_up_logging
from megaskip.parallel.agree import attempt_on_first_rank, on_first_rank
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.progress import ProgressBatches, progress_bar
from megaskip.reporting.summary import table
from megaskip.runs.source import TrainedRouters, find_routers, open_text, read_as


def calibrate(options: CalibrateOptions) -> None:
    """Calibrate, write the thresholds and print a table. Every rank calls it.

    Raises UnreachedError, after that, for capacities that the routers do not keep.
    """
    topology = read_topology(os.environ)
    set_up_logging(rank=topology.rank)
    job = CalibrationJob(options, topology, shows_progress=topology.is_first)
    with process_group(topology, timeout=job.config.parallel.dist_timeout):
        result = job.search()
        if topology.is_first and result.points:
            title = f"calibrated: {job.output} (held-out loss, dense: {result.dense_loss:.4f})"
            rows = [_row(point, allocated=options.allocate > 0) for point in result.points]
            rows += [(f"load at {c:g}", load.describe()) for c, load in result.loads.items()]
            print("\n".join(table(rows, title=title)))
        job.write(result)
    result.require_all()


class CalibrationJob:
    """A calibration of the routers in a folder: checked when it is made, then `search` and
    `write`."""

    def __init__(
        self, options: CalibrateOptions, topology: Topology, *, shows_progress: bool
    ) -> None:
        """Read routers and text of `options`; before any process group, so that no rank waits for
        another. Raises ConfigError for what cannot work."""
        self._options, self._topology, self._shows_progress = options, topology, shows_progress
        self._routers = find_routers(options.source)
        self.output = _output(options, self._routers)
        self._stored, self._layers, described = read_router_config(self._routers.folder)
        require_rounds(self._stored, options.allocate)
        if self._stored.budget in UNDECIDED:
            raise ConfigError(
                f"the routers in {self._routers.folder} decide nothing: they were made with "
                f"--budget {self._stored.budget}, under which no threshold counts; name routers "
                "that were trained with --budget global or layer"
            )
        if described is not None:
            described.require(describe_folder(self._routers.base), "the router folder")
        if options.ds_config is not None:
            from megaskip.parallel.zero3 import prepare_deepspeed

            prepare_deepspeed()
        self.config = _run_config(options, self._routers)
        self._source = source = resolve_source(self.config.model)
        self._weights = attempt_on_first_rank(topology, lambda: check_weights(source))
        self._loader = self._open_text() if self._weights.error is None else None

    def _open_text(self) -> DataLoader:
        loader = open_text(
            self.config.data,
            self.config.model,
            self._source,
            prompt_tokens=self._stored.prompt_tokens,
            micro_batch_size=self._options.micro_batch_size,
            rank=self._topology.rank,
            world_size=self._topology.world_size,
        )
        if not len(loader.data.held_out):
            raise ConfigError(
                "no text is held out to check the capacities on; give --eval_data, or more --data"
            )
        return loader

    def search(self) -> CalibrationResult:
        """Return the thresholds, found on the text and checked on held-out text. Collective."""
        options, loader = self._options, self._loader
        source = dataclasses.replace(self._source, weights=self._weights.shared())
        assert loader is not None
        capacities = sorted(set(options.capacity))
        hidden = None if self._shows_progress else True
        held_out = ProgressBatches(loader.held_out(), "held out", disable=hidden)
        total = len(capacities) * (1 + options.allocate)
        with progress_bar(total=total, desc="calibrating", disable=hidden) as bar:
            engine = routed_engine(self.config, self._topology, source, self._routers.folder)
            rows = loader.calibration(options.rows)
            result = calibrate_all(
                engine,
                ProgressBatches(rows, "a pass", disable=hidden),
                held_out,
                capacities,
                rounds=options.allocate,
                progress=bar.update,
            )
            dense_loss = engine.evaluate(held_out, routed=False).loss
            loads = measure_loads(engine, held_out, result.points)
        return dataclasses.replace(result, dense_loss=dense_loss, loads=loads)

    def write(self, result: CalibrationResult) -> None:
        """Put the thresholds that were found into the settings of the output folder. Collective."""
        if result.points:
            stored, weights = self._stored, result.weights
            if result.equal_logits:
                stored = decide_as_before(stored, self._layers, result.equal_logits)
            settings, folder = with_points(stored, result.points), self._routers.folder
            on_first_rank(self._topology, lambda: _write(folder, self.output, settings, weights))
            if result.loads:
                on_first_rank(self._topology, lambda: write_loads(self.output, result.loads))


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


def _write(
    routers: Path, output: Path, config: RouterConfig, weights: Mapping[str, Tensor] | None
) -> None:
    """Put the calibrated settings where they are asked for, and weights that are new."""
    if output.resolve() != routers.resolve():
        with new_folder(output) as folder:
            shutil.copytree(routers, folder, dirs_exist_ok=True)
    update_router_config(output, config)  # first: it decides alike with the old weights
    if weights is not None:
        update_router_weights(output, weights)


def measure_loads(
    engine: Engine, held_out: Sequence[Batch | None], points: Sequence[CalibratedCapacity]
) -> dict[float, ExpertLoad]:
    """Return the load of experts at each of `points`, by capacity; nothing where no experts are
    skipped. Collective."""
    if engine.routers.experts is None:
        return {}
    loads = {}
    for point in points:
        settings = dataclasses.replace(engine.routers.config, threshold=point.threshold)
        engine.routers.configure(settings)
        loads[point.capacity] = measure_load(engine, held_out)
    return loads


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
