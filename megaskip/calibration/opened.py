"""A model with fresh routers and the text to work on, opened for a job of `megaskip fit` and
`megaskip fit-routers`."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaskip._version import __version__
from megaskip.calibration.fit_progress import FitProgress
from megaskip.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
)
from megaskip.config.commands.fit import TextAndModel
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError
from megaskip.parallel.agree import attempt_on_first_rank
from megaskip.parallel.build import build_engine
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.engine import Engine
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.runs.source import open_text


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a job works with."""

    engine: Engine
    loader: DataLoader
    source: ModelSource
    topology: Topology

    def progress(self, output: Path, settings: Mapping[str, Any]) -> FitProgress:
        """Return what an earlier start of the job with these settings has done, from a file beside
        the folder that it writes. Raises CheckpointError as FitProgress does. Collective."""
        known = {
            "base": self.source.describe().to_json(),
            "text": self.loader.data.fingerprint,
            "ranks": self.topology.world_size,
            "version": __version__,
        }
        path = output.with_name(f"{output.name}.partial.safetensors")
        return FitProgress(path, {**settings, **known}, self.topology)


def topology_of(base: TextAndModel) -> Topology:
    """Return where this rank stands."""
    return read_topology(os.environ, num_stages=base.pipeline_stages)


@contextlib.contextmanager
def opened(
    base: TextAndModel,
    router_of: Callable[[int], RouterConfig],
    topology: Topology,
    *,
    activation_checkpointing: bool = False,
) -> Iterator[Opened]:
    """Load the model with fresh routers, and the text; hold the process group. `router_of` is told
    how many layers the model has. Collective.

    What cannot work is found before any rank waits for another: first what is wrong with the
    weights, since a broken configuration has a wrong number of layers. Raises ConfigError when no
    text is held out.
    """
    source = resolve_source(_model_of(base))
    weights = attempt_on_first_rank(topology, lambda: check_weights(source))
    if weights.error is None:
        router = router_of(source.text_config.num_hidden_layers)
        config = _run_config(base, router, activation_checkpointing)
        loader = _loader(config, source, topology)
    ds_content = read_ds_config(base.ds_config)
    if ds_content is not None and topology.num_stages == 1:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    with process_group(topology, timeout=ParallelConfig().dist_timeout):
        source = dataclasses.replace(source, weights=weights.shared())  # raises where they are not
        engine = build_engine(config, topology, source, ds_content)
        yield Opened(engine=engine, loader=loader, source=source, topology=topology)


def _model_of(base: TextAndModel) -> ModelConfig:
    return ModelConfig(
        model=base.model,
        revision=base.revision,
        tokenizer=base.tokenizer,
        dtype=base.dtype,
        trust_remote_code=base.trust_remote_code,
    )


def _run_config(base: TextAndModel, router: RouterConfig, recompute: bool) -> RunConfig:
    return RunConfig(
        model=_model_of(base),
        router=router,
        data=DataConfig(
            data=base.data,
            eval_data=base.eval_data,
            held_out=base.held_out,
            seq_length=base.seq_length,
            chat_template=base.chat_template,
            cache_dir=base.cache_dir,
            seed=base.seed,
        ),
        optim=OptimConfig(micro_batch_size=base.micro_batch_size, seed=base.seed),
        parallel=ParallelConfig(
            ds_config=base.ds_config,
            pipeline_stages=base.pipeline_stages,
            activation_checkpointing=recompute,
        ),
    )


def _loader(config: RunConfig, source: ModelSource, topology: Topology) -> DataLoader:
    loader = open_text(
        config.data,
        config.model,
        source,
        prompt_tokens=config.router.prompt_tokens,
        micro_batch_size=config.optim.micro_batch_size,
        rank=topology.replica,
        world_size=topology.num_replicas,
    )
    if not len(loader.data.held_out):
        raise ConfigError("no text is held out to measure on; give --eval_data, or more --data")
    return loader
