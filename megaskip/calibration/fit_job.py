"""The job of `megaskip fit`: layers to drop for every text, and maps in their places, in closed
form."""

import dataclasses
import shlex
from pathlib import Path

from megaskip.calibration.opened import opened, topology_of
from megaskip.calibration.static_drop import (
    Fitted,
    candidate_layers,
    fit_static_drop,
    static_routers,
)
from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.routers import save_routers
from megaskip.config import RouterConfig
from megaskip.config.commands.fit import DropPlan, FitOptions
from megaskip.config.paths import require_new
from megaskip.log import set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.loading.source import ModelSource
from megaskip.reporting.summary import table
from megaskip.routing import RouterSet

REPORT = "fit.json"


def fit(options: FitOptions) -> None:
    """Fit, write the router folder and print what was chosen. Every rank calls it."""
    base, plan = options.base, options.plan
    topology = topology_of(base)
    set_up_logging(rank=topology.rank)
    require_new(options.output)
    with opened(base, lambda depth: _router_config(plan, depth), topology) as job:
        depth = job.source.text_config.num_hidden_layers
        _, count = candidate_layers(plan, depth)
        hidden = None if topology.is_first else True
        settings = {**dataclasses.asdict(base), **dataclasses.asdict(plan)}
        progress = job.progress(options.output, settings)
        fitted = fit_static_drop(
            job.engine, job.loader, plan, count, hidden=hidden, progress=progress
        )
        static = static_routers(job.engine.routers, fitted.order)
        on_first_rank(topology, lambda: _write(options.output, static, job.source, fitted))
        progress.remove()
    if topology.is_first:
        title = f"fitted: {options.output} ({count} of {depth} {plan.target} dropped)"
        print("\n".join(table([*fitted.rows(), ("next", _next(options))], title=title)))


def _router_config(plan: DropPlan, depth: int) -> RouterConfig:
    candidates, _ = candidate_layers(plan, depth)
    return RouterConfig(
        granularity=f"{plan.target}_sequence",
        layers=candidates,
        compensation=plan.compensation,
        compensation_rank=plan.compensation_rank,
    )


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
