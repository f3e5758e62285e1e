"""A whole training run of a tiny model in one process: real engine, loader, files; no flags."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from families import tiny_model
from routed_models import VOCABULARY

from megaskip import RouterConfig, attach_routers
from megaskip.arch.adapters import add_adapters
from megaskip.arch.task_loss import TaskLoss
from megaskip.checkpoint import describe_base
from megaskip.config import LogConfig, RunConfig
from megaskip.config.run import CheckpointConfig, OptimConfig
from megaskip.data import DataStats, Row, TokenizedData
from megaskip.data.loader import DataLoader
from megaskip.parallel.engine import Engine
from megaskip.parallel.full_engine import FullEngine
from megaskip.parallel.loading.source import DEMO_FOLDER
from megaskip.parallel.protocol import StepEngine
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.training.checkpointer import Checkpointer, TrainedWeights
from megaskip.training.full_trainer import FullTrainer, ModelWeights
from megaskip.training.reporter import RunReporter
from megaskip.training.router_trainer import RouterTrainer, RouterWeights
from megaskip.training.schedule import total_steps


def tiny_config(**optim: Any) -> RunConfig:
    """Return the settings of a run of six steps that saves every second one."""
    defaults: dict[str, Any] = {"max_steps": 6, "lr": 1e-2, "calibration_rows": 16}
    return RunConfig(
        optim=OptimConfig(**defaults | optim),
        router=RouterConfig(layers="1-4"),
        checkpoint=CheckpointConfig(save_every=2, keep_last=2),
        log=LogConfig(progress=False, tensorboard=False, log_every=2, eval_every=3),
    )


def rows(count: int, seed: int = 0) -> list[Row]:
    """Return prompts of three tokens with random answers of different lengths."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = generator.integers(3, VOCABULARY, generator.integers(6, 14), dtype=np.int32)
        supervised = np.arange(len(ids)) >= 3
        made.append(Row(input_ids=ids, supervised=supervised, prompt_length=3, source=0))
    return made


def tiny_data(held_out: int = 6) -> TokenizedData:
    """Return 32 rows to train on, and `held_out` others."""
    stats = DataStats(
        sources=(), train_rows=32, train_tokens=320, held_out_rows=6, duplicates_of_held_out=0
    )
    return TokenizedData(
        train=rows(32),  # type: ignore[arg-type]  # lists can be indexed, too
        held_out=rows(held_out, seed=1),
        stats=stats,
        fingerprint="tiny",
    )


def tiny_loader(config: RunConfig, data: TokenizedData | None = None) -> DataLoader:
    """Return the loader of one replica."""
    optim = config.optim
    return DataLoader(
        data=data or tiny_data(),
        rank=0,
        world_size=1,
        micro_batch_size=optim.micro_batch_size,
        global_batch_size=optim.micro_batch_size * optim.gradient_accumulation_steps,
        seed=optim.seed,
        pad_token_id=0,
        prompt_tokens=config.router.prompt_tokens,
    )


@contextmanager
def alone() -> Iterator[Topology]:
    """Hold the process group of one process open."""
    topology = read_topology({})
    with process_group(topology, timeout=60):
        yield topology


def tiny_engine(config: RunConfig, topology: Topology) -> Engine:
    """Return an engine that trains fresh routers of a tiny model."""
    model = tiny_model()
    routers = attach_routers(model, config.router, register=False)
    add_adapters(model, routers, model, config)
    return Engine(TaskLoss(model, chunk_tokens=64), routers, config, topology)


def tiny_full_engine(config: RunConfig, topology: Topology) -> FullEngine:
    """Return an engine that trains every weight of a tiny model."""
    model = tiny_model().requires_grad_(True).train()
    return FullEngine(TaskLoss(model, chunk_tokens=64), config, topology)


def router_trainer(
    output_dir: Path, topology: Topology, config: RunConfig, data: TokenizedData | None = None
) -> RouterTrainer:
    """Return the trainer of a router-tuning run that writes into `output_dir`."""
    engine = tiny_engine(config, topology)
    weights = RouterWeights(engine.routers, describe_base(engine.module.model.config))
    pieces = _pieces(output_dir, topology, config, engine, weights, data)
    return RouterTrainer(engine=engine, **pieces)


def full_trainer(output_dir: Path, topology: Topology, config: RunConfig) -> FullTrainer:
    """Return the trainer of a run of every weight that writes into `output_dir`."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, train="full"))
    engine = tiny_full_engine(config, topology)
    weights = ModelWeights(engine.module.model, config, DEMO_FOLDER / "backbone")
    pieces = _pieces(output_dir, topology, config, engine, weights, None)
    return FullTrainer(engine=engine, **pieces)


def _pieces(
    output_dir: Path,
    topology: Topology,
    config: RunConfig,
    engine: StepEngine,
    weights: TrainedWeights,
    data: TokenizedData | None,
) -> dict[str, Any]:
    loader = tiny_loader(config, data)
    steps = total_steps(config.optim, loader)
    layers = engine.routers.layers if isinstance(engine, Engine) else ()
    output_dir.mkdir(parents=True, exist_ok=True)
    return {
        "config": config,
        "topology": topology,
        "loader": loader,
        "checkpointer": Checkpointer(
            output_dir=output_dir,
            topology=topology,
            engine=engine,
            weights=weights,
            base=describe_base(engine.module.model.config),
            keep_last=config.checkpoint.keep_last,
            train=config.model.train,
            seed=config.optim.seed,
            global_batch_size=loader.global_batch_size,
            data_fingerprint=loader.data.fingerprint,
        ),
        "reporter": RunReporter(
            config=config,
            topology=topology,
            output_dir=output_dir,
            layers=layers,
            total_steps=steps,
        ),
        "total_steps": steps,
    }
