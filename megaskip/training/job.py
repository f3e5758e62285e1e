"""A training job from its flags to its report: the order in which things are checked, made and
released."""

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from megaskip.arch.trainable import describe_layers, describe_trainable
from megaskip.checkpoint import BaseModel
from megaskip.checkpoint.resume import read_state
from megaskip.checkpoint.run_tokenizer import given_tokenizer
from megaskip.checkpoint.weight_index import require_whole_shards
from megaskip.config import DataConfig, RunConfig
from megaskip.config.run import DEMO
from megaskip.data import StreamingRows, TokenizedData, build_dataset
from megaskip.data.dataset import require_known_tokens
from megaskip.data.loader import DataLoader
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError
from megaskip.log import get_logger, quiet_libraries, set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.build import build_engine
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.heartbeat import HeartbeatMonitor
from megaskip.parallel.loading.source import DEMO_FOLDER, ModelSource, resolve_source
from megaskip.parallel.measure import bytes_by_kind
from megaskip.parallel.preflight import preflight
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.summary import human_bytes, table, versions
from megaskip.training.dry_run import dry_run_lines
from megaskip.training.run_folder import (
    choose_run_folder,
    discard_if_empty,
    hold_run_folder,
    is_finished,
    reopen,
    write_run_file,
)
from megaskip.training.trainer import Trainer

logger = get_logger(__name__)

_FINISHED = "%s is finished at step %d: nothing to do; a larger --max_steps or --epochs goes on"


def train(config: RunConfig) -> None:
    """Train as `config` says. Every rank calls it."""
    dry = config.dry_run
    topology = read_topology(os.environ, num_stages=1 if dry else config.parallel.pipeline_stages)
    set_up_logging(rank=topology.rank)
    quiet_libraries()
    ds_content = read_ds_config(config.parallel.ds_config, config)
    source = resolve_source(config.model)
    if config.dry_run:
        if topology.is_first:
            config = dataclasses.replace(config, data=_with_demo(config.data))
            stages = config.parallel.pipeline_stages
            world_size = config.parallel.world_size or max(topology.world_size, stages)
            print("\n".join(dry_run_lines(config, source, world_size)))
        return
    require_whole_shards(source.folder)
    data, pad_token_id = _read_data(config, source)
    if ds_content is not None and topology.num_stages == 1:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(topology, timeout=config.parallel.dist_timeout))
        stack.enter_context(_heartbeat(config, topology))
        output_dir, resume = on_first_rank(topology, lambda: choose_run_folder(config))
        if topology.is_first and config.checkpoint.output_dir is None:
            stack.callback(discard_if_empty, output_dir)  # of a start that failed
        stack.enter_context(hold_run_folder(topology, output_dir))
        nodes = preflight(
            config,
            topology,
            output_dir,
            source.folder,
            data.fingerprint,
            versions(),
            ds_content or {},
        )
        for line in table(nodes, title="nodes"):
            logger.info("%s", line)
        engine = build_engine(config, topology, source, ds_content)
        loader = _loader(config, topology, data, pad_token_id, resume)
        base = source.describe()
        trainer = _trainer(config, topology, engine, loader, base, output_dir, source.folder)
        if resume is not None:
            trainer.resume(resume)
            if on_first_rank(topology, lambda: is_finished(output_dir)):
                if trainer.step >= trainer.total_steps:
                    logger.info(_FINISHED, output_dir, trainer.step)
                    return
                on_first_rank(topology, lambda: reopen(output_dir))
        on_first_rank(topology, lambda: write_run_file(output_dir, config, topology.world_size))
        _print_header(trainer, source.folder)
        trainer.run()


def _heartbeat(config: RunConfig, topology: Topology) -> HeartbeatMonitor:
    return HeartbeatMonitor(topology, silence=config.parallel.heartbeat_timeout)


# -- data


def _read_data(config: RunConfig, source: ModelSource) -> tuple[TokenizedData, int]:
    """Return tokenised data and the padding token; before any process group exists, so nobody times
    out."""
    tokenizer = load_tokenizer(
        config.model.tokenizer or source.folder, trust_remote_code=source.trust_remote_code
    )
    model = source.text_config
    longest = getattr(model, "max_position_embeddings", None)
    if longest is not None and config.data.seq_length > longest:
        message = "--seq_length %d is more than the %d positions that the model was made for"
        logger.info(message, config.data.seq_length, longest)
    data = build_dataset(_with_demo(config.data), tokenizer)
    # Going through all tokens takes time, and where the tokenizer knows no more it is not needed.
    if max(tokenizer.get_vocab().values(), default=0) >= model.vocab_size:
        require_known_tokens(data, model.vocab_size)
    # Padding is masked everywhere, so any token does.
    known = tokenizer.pad_token_id < model.vocab_size
    return data, tokenizer.pad_token_id if known else 0


def _with_demo(data: DataConfig) -> DataConfig:
    """Replace the name "demo" by the instruction set that ships with megaskip."""
    path = str(DEMO_FOLDER / "instruct.jsonl")
    entries = tuple(
        path + entry.removeprefix(DEMO) if entry == DEMO or entry.startswith(f"{DEMO}:") else entry
        for entry in data.data
    )
    return dataclasses.replace(data, data=entries)


def _loader(
    config: RunConfig,
    topology: Topology,
    data: TokenizedData,
    pad_token_id: int,
    resume: Path | None,
) -> DataLoader:
    optim, world = config.optim, topology.num_replicas
    size = optim.micro_batch_size * optim.gradient_accumulation_steps * world
    if resume is not None:
        size = _same_global_batch(resume, config, world)
    return DataLoader(
        data=data,
        rank=topology.replica,
        world_size=world,
        micro_batch_size=optim.micro_batch_size,
        global_batch_size=size,
        seed=optim.seed,
        pad_token_id=pad_token_id,
        prompt_tokens=config.router.prompt_tokens,
    )


def _same_global_batch(resume: Path, config: RunConfig, world: int) -> int:
    """Return the global batch of the run that continues: another number of ranks accumulates more
    or less."""
    size = read_state(resume).global_batch_size
    share = config.optim.micro_batch_size * world
    if size % share:
        raise ConfigError(
            f"--resume {resume}: its global batch of {size} rows cannot be split over {world} "
            f"replicas with --micro_batch_size {config.optim.micro_batch_size}; choose one so that "
            f"replicas x size divides {size}"
        )
    if size // share != config.optim.gradient_accumulation_steps:
        logger.info(
            "gradient accumulation is %d, to keep the global batch of %d rows", size // share, size
        )
    return size


# -- the trainer and its header


def _trainer(
    config: RunConfig,
    topology: Topology,
    engine: Engine,
    loader: DataLoader,
    base: BaseModel,
    output_dir: Path,
    folder: Path,
) -> Trainer:
    def save_hf(path: Path) -> None:
        model: Any = engine.module.model
        transformers_logging.disable_progress_bar()  # of one shard, again at every checkpoint
        model.save_pretrained(path, max_shard_size="1TB")
        given_tokenizer(
            config.model.tokenizer or folder,
            config.data.chat_template,
            trust_remote_code=config.model.trust_remote_code,
        ).save_pretrained(path)

    return Trainer(
        config=config,
        topology=topology,
        engine=engine,
        loader=loader,
        base=base,
        output_dir=output_dir,
        total_steps=total_steps(config, loader),
        save_hf=save_hf,
    )


def total_steps(config: RunConfig, loader: DataLoader) -> int:
    """Return how many optimizer steps the run takes."""
    if config.optim.max_steps is not None:
        return config.optim.max_steps
    if isinstance(loader.data.train, StreamingRows):
        raise ConfigError("--streaming needs --max_steps: the length of a stream is not known")
    return max(
        math.ceil(config.optim.epochs * len(loader.data.train) / loader.global_batch_size), 1
    )


def _print_header(trainer: Trainer, folder: Path) -> None:
    """Print what runs, on what, and what it takes, measured. Collective."""
    config, engine, loader, topology = (
        trainer.config,
        trainer.engine,
        trainer.loader,
        trainer.topology,
    )
    sizes = bytes_by_kind(engine)
    count = sum(p.numel() for p in engine.parameters.values())
    routers = engine.routers
    optim = config.optim
    rows = [
        ("model", f"{folder} ({trainer.base.model_type}, {trainer.base.num_layers} layers)"),
        ("trains", _trainable_text(engine, count)),
        (
            "engine",
            f"{_engine_name(config, topology)} on {topology.world_size} rank(s), "
            f"{topology.device.type}, {next(engine.module.parameters()).dtype}",
        ),
        (
            "bytes on rank 0",
            "  ".join(f"{kind} {human_bytes(size)}" for kind, size in sizes.items()),
        ),
        (
            "batch",
            f"{loader.global_batch_size} rows = {loader.world_size} replica(s) x "
            f"{optim.micro_batch_size} x "
            f"{loader.global_batch_size // (loader.world_size * optim.micro_batch_size)}, "
            f"{trainer.total_steps} steps",
        ),
        *(("data", line) for line in loader.data.stats.lines()),
        ("run folder", str(trainer.output_dir)),
        ("versions", "  ".join(f"{name} {number}" for name, number in versions().items())),
    ]
    if routers is not None:
        asked = f"{routers.config.capacity:.2f} of layers {describe_layers(routers.layers)}"
        rows.insert(
            2,
            (
                "capacity asked",
                f"{asked}, {routers.config.granularity}, budget {routers.config.budget}",
            ),
        )
    for line in table(rows, title="megaskip"):
        logger.info("%s", line)


def _engine_name(config: RunConfig, topology: Topology) -> str:
    if topology.num_stages > 1:
        return f"pipeline of {topology.num_stages} stages"
    return "ZeRO-3" if config.parallel.ds_config else "replicas"


def _trainable_text(engine: Engine, count: int) -> str:
    if engine.routers is None:
        return f"every weight, {count:,} parameters"
    return describe_trainable({name: tuple(p.shape) for name, p in engine.parameters.items()})
