"""The job of `megaskip fit`: layers to drop for every text, and maps in their places, in closed
form."""

import dataclasses
import os
import shlex
from pathlib import Path

from megaskip.calibration.static_drop import (
    Fitted,
    candidate_layers,
    fit_static_drop,
    static_routers,
)
from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.routers import save_routers
from megaskip.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
)
from megaskip.config.commands.fit import DropPlan, FitOptions, TextAndModel
from megaskip.config.paths import require_new
from megaskip.data.loader import DataLoader
from megaskip.errors import ConfigError
from megaskip.log import quiet_libraries, set_up_logging
from megaskip.parallel.agree import attempt_on_first_rank, on_first_rank
from megaskip.parallel.build import build_engine
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.loading.source import ModelSource, resolve_source
from megaskip.parallel.loading.weight_check import check_weights
from megaskip.parallel.topology import Topology, process_group, read_topology
from megaskip.reporting.summary import table
from megaskip.routing import RouterSet
from megaskip.runs.source import open_text

REPORT = "fit.json"


def fit(options: FitOptions) -> None:
    """Fit, write the router folder and print what was chosen. Every rank calls it."""
    base, plan = options.base, options.plan
    topology = read_topology(os.environ, num_stages=base.pipeline_stages)
    set_up_logging(rank=topology.rank)
    quiet_libraries()
    require_new(options.output)
    source = resolve_source(_model_of(base))
    weights = attempt_on_first_rank(topology, lambda: check_weights(source))
    depth = source.text_config.num_hidden_layers
    candidates, count = candidate_layers(plan, depth)
    config = _run_config(base, plan, candidates)
    loader = _loader(config, source, topology) if weights.error is None else None
    ds_content = read_ds_config(base.ds_config)
    if ds_content is not None and topology.num_stages == 1:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    with process_group(topology, timeout=config.parallel.dist_timeout):
        source = dataclasses.replace(source, weights=weights.shared())
        assert loader is not None
        engine = build_engine(config, topology, source, ds_content)
        hidden = None if topology.is_first else True
        fitted = fit_static_drop(engine, loader, plan, count, hidden=hidden)
        static = static_routers(engine.routers, fitted.order)
        on_first_rank(topology, lambda: _write(options.output, static, source, fitted))
    if topology.is_first:
        title = f"fitted: {options.output} ({count} of {depth} {plan.target} dropped)"
        print("\n".join(table([*fitted.rows(), ("next", _next(options))], title=title)))


def _next(options: FitOptions) -> str:
    """Return the command that goes on from what was fitted."""
    if options.plan.compensation == "none":
        start = f"megaskip export-static --routers {options.output} --output smaller --verify"
    else:
        start = f"megaskip train --model {options.base.model} --init_routers {options.output}"
        start += " --distill 0.5"
    given = {"tokenizer": options.base.tokenizer, "chat_template": options.base.chat_template}
    named = [f"--{name} {shlex.quote(value)}" for name, value in given.items() if value]
    return " ".join([start, *named])


def _write(output: Path, static: RouterSet, source: ModelSource, fitted: Fitted) -> None:
    save_routers(output, static, base=source.describe())
    write_json(output / REPORT, fitted.to_json())


# -- settings


def _model_of(base: TextAndModel) -> ModelConfig:
    return ModelConfig(
        model=base.model,
        revision=base.revision,
        tokenizer=base.tokenizer,
        dtype=base.dtype,
        trust_remote_code=base.trust_remote_code,
    )


def _run_config(base: TextAndModel, plan: DropPlan, candidates: tuple[int, ...]) -> RunConfig:
    return RunConfig(
        model=_model_of(base),
        router=RouterConfig(
            granularity=f"{plan.target}_sequence",
            layers=candidates,
            compensation=plan.compensation,
            compensation_rank=plan.compensation_rank,
        ),
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
        parallel=ParallelConfig(ds_config=base.ds_config, pipeline_stages=base.pipeline_stages),
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
