"""A training job from its flags to its report: the order in which things are checked, made and
released."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip.checkpoint import BaseModel
from megaskip.checkpoint.resume import read_state
from megaskip.config import RunConfig
from megaskip.data import TokenizedData
from megaskip.data.demo import with_demo
from megaskip.data.loader import DataLoader
from megaskip.log import get_logger, set_up_logging
from megaskip.parallel.agree import attempt_on_first_rank, on_first_rank
from megaskip.parallel.build import build_engine, build_full_engine, require_four_bit_fits
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.heartbeat import HeartbeatMonitor
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import check_weights, check_what_is_there
from megaskip.parallel.loading.weight_plan import WeightPlan
from megaskip.parallel.preflight import preflight
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.sequence import require_sequence_parallel
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.summary import table, versions
from megaskip.reporting.trackers import require_trackers
from megaskip.training.checkpointer import Checkpointer, TrainedWeights
from megaskip.training.data import make_loader, read_data
from megaskip.training.dry_run import dry_run_lines
from megaskip.training.full_trainer import FullTrainer, ModelWeights
from megaskip.training.header import log_header
from megaskip.training.initial_routers import load_initial_routers, with_initial_routers
from megaskip.training.loop import Trainer
from megaskip.training.prefix import PrefixCache, open_prefix_cache
from megaskip.training.reporter import RunReporter
from megaskip.training.router_trainer import RouterTrainer, RouterWeights
from megaskip.training.run_folder import (
    has_stopped_early,
    is_finished,
    open_run_folder,
    reopen,
    write_run_file,
)
from megaskip.training.schedule import total_steps

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What a job has before it loads the model."""

    config: RunConfig
    topology: Topology
    source: ModelSource
    """The base model."""
    ds_content: dict[str, Any] | None
    """The DeepSpeed JSON; None without one."""
    data: TokenizedData
    pad_token_id: int
    output_dir: Path
    checkpoint: Path | None
    """The one that the run continues from; None for a new run."""


def train(config: RunConfig) -> None:
    """Train as `config` says. Every rank calls it."""
    topology = _read_topology(config)
    set_up_logging(rank=topology.rank)
    config = with_initial_routers(config)
    ds_content = read_ds_config(config.parallel.ds_config, config)
    source = resolve_source(config.model)
    require_sequence_parallel(source, config.parallel.sequence_parallel_size)
    if config.dry_run:
        _print_plan(config, topology, source)
        return
    # Before there is a process group: in one, ranks would time out while they wait for a slow one.
    weights = attempt_on_first_rank(topology, lambda: _check_first(config, source))
    data = read_data(config, source) if weights.error is None else None
    if topology.sequence_size > 1 or (ds_content is not None and topology.num_stages == 1):
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    with (
        process_group(topology, timeout=config.parallel.dist_timeout),
        HeartbeatMonitor(topology, silence=config.parallel.heartbeat_timeout),
    ):
        source = dataclasses.replace(source, weights=weights.shared())
        assert data is not None
        with open_run_folder(config, topology) as (output_dir, checkpoint):
            job = _Job(
                config=config,
                topology=topology,
                source=source,
                ds_content=ds_content,
                data=data[0],
                pad_token_id=data[1],
                output_dir=output_dir,
                checkpoint=checkpoint,
            )
            _run(job)


def _read_topology(config: RunConfig) -> Topology:
    """Return this process's place; a plan is made by a process that may be alone."""
    if config.dry_run:
        return read_topology(os.environ)
    parallel = config.parallel
    return read_topology(
        os.environ,
        num_stages=parallel.pipeline_stages,
        sequence_size=parallel.sequence_parallel_size,
    )


def _check_first(config: RunConfig, source: ModelSource) -> WeightPlan:
    """Return which stored tensor becomes which weight; raises MegaskipError where that, or a
    tracker, is not fit for use."""
    require_trackers(config.log.trackers)
    plan = check_weights(source)
    require_four_bit_fits(source, config)
    return plan


def _print_plan(config: RunConfig, topology: Topology, source: ModelSource) -> None:
    """Print the table of --dry_run, on the first rank."""
    if topology.is_first:
        require_trackers(config.log.trackers)
        check_what_is_there(source)
        require_four_bit_fits(source, config)
        config = dataclasses.replace(config, data=with_demo(config.data))
        parallel = config.parallel
        fewest = max(parallel.pipeline_stages, parallel.sequence_parallel_size)
        world_size = parallel.world_size or max(topology.world_size, fewest)
        print("\n".join(dry_run_lines(config, source, world_size)))


def _run(job: _Job) -> None:
    """Check the nodes, load, continue where a checkpoint stands, and train. Collective."""
    config, topology, output_dir = job.config, job.topology, job.output_dir
    _check_nodes(job)
    trainer = _make_trainer(job)
    if job.checkpoint is not None:
        trainer.resume(job.checkpoint)
        if on_first_rank(topology, lambda: is_finished(output_dir)):
            patience = config.log.early_stop
            early = on_first_rank(topology, lambda: has_stopped_early(output_dir, patience))
            if early or trainer.step >= trainer.total_steps:
                more = "--early_stop" if early else "--max_steps or --epochs"
                logger.info(
                    "%s is finished at step %d: nothing to do; a larger %s goes on",
                    output_dir,
                    trainer.step,
                    more,
                )
                return
            on_first_rank(topology, lambda: reopen(output_dir))
    on_first_rank(topology, lambda: write_run_file(output_dir, config, topology.world_size))
    log_header(trainer, job.source)
    trainer.run()


def _check_nodes(job: _Job) -> None:
    """Log what the nodes are; raises what `preflight` finds wrong with them. Collective."""
    nodes = preflight(
        job.config,
        job.topology,
        job.output_dir,
        job.source,
        job.data.fingerprint,
        versions(),
        job.ds_content or {},
    )
    for line in table(nodes, title="nodes"):
        logger.info("%s", line)


def _make_trainer(job: _Job) -> Trainer:
    """Load the model and return this rank's trainer of what --train names. Collective."""
    config, topology, source = job.config, job.topology, job.source
    if config.model.train == "full":
        full_engine = build_full_engine(config, topology, source)
        model = ModelWeights(full_engine.module.model, config, source.folder)
        return _assemble(job, FullTrainer, full_engine, model, source.describe())
    prefix = None if config.parallel.cache_prefix is None else _open_prefix(job)
    engine = build_engine(config, topology, source, job.ds_content)
    base = source.describe()
    if job.checkpoint is None:
        load_initial_routers(config, engine.routers, base)
    routers = RouterWeights(engine.routers, base)
    kind = functools.partial(RouterTrainer, prefix=prefix)
    return _assemble(job, kind, engine, routers, base, layers=engine.routers.layers)


def _open_prefix(job: _Job) -> PrefixCache:
    """Return the cache of --cache_prefix; raises ConfigError or DataError. Collective."""
    loader = _loader(job)
    return open_prefix_cache(
        job.config,
        job.topology,
        job.source,
        loader,
        first_step=0 if job.checkpoint is None else read_state(job.checkpoint).step,
        total_steps=total_steps(job.config.optim, loader),
    )


def _loader(job: _Job) -> DataLoader:
    return make_loader(job.config, job.topology, job.data, job.pad_token_id, job.checkpoint)


def _assemble(
    job: _Job,
    kind: Callable[..., Trainer],
    engine: StepEngine,
    weights: TrainedWeights,
    base: BaseModel,
    *,
    layers: Sequence[int] = (),
) -> Trainer:
    """Return a trainer of a `kind` with its loader, checkpointer and reporter; `layers` are the
    routed ones. Raises ConfigError when batches or steps do not come out."""
    config, topology = job.config, job.topology
    loader = _loader(job)
    steps = total_steps(config.optim, loader)
    return kind(
        config=config,
        topology=topology,
        engine=engine,
        loader=loader,
        checkpointer=Checkpointer(
            output_dir=job.output_dir,
            topology=topology,
            engine=engine,
            weights=weights,
            base=base,
            keep_last=config.checkpoint.keep_last,
            train=config.model.train,
            seed=config.optim.seed,
            global_batch_size=loader.global_batch_size,
            data_fingerprint=job.data.fingerprint,
        ),
        reporter=RunReporter(
            config=config,
            topology=topology,
            output_dir=job.output_dir,
            layers=layers,
            total_steps=steps,
        ),
        total_steps=steps,
    )
