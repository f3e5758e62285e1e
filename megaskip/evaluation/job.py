"""The job of `megaskip evaluate`: ranks, table and file."""

import os
from pathlib import Path
from typing import Any

import transformers

from megaskip.checkpoint.atomic import write_json
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.config.commands.evaluate import EvaluateOptions
from megaskip.data.template import read_template
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, MegaskipError
from megaskip.evaluation.evaluate import EvalSettings, evaluate_lm, find_tasks, quiet_lm_eval
from megaskip.evaluation.lm import MegaskipLM
from megaskip.evaluation.report import EvalReport
from megaskip.evaluation.runner import LocalRunner, Runner, StageRunner
from megaskip.log import get_logger, set_up_logging
from megaskip.parallel.agree import on_first_rank
from megaskip.parallel.ds_config import read_ds_config
from megaskip.parallel.heartbeat import HeartbeatMonitor
from megaskip.parallel.inference import Placement, load_for_inference
from megaskip.parallel.topology import Topology, process_group, read_topology

logger = get_logger(__name__)

_PATIENCE = 24 * 3600
"""Seconds that ranks wait for the first one, which makes prompts and scores alone."""
_SILENCE = 120
"""Seconds without a sign of life after which a rank counts as dead."""


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate, print the table and write the report. Every rank calls it."""
    topology = read_topology(os.environ, num_stages=options.pipeline_stages)
    set_up_logging(rank=topology.rank)
    quiet_lm_eval()
    transformers.utils.logging.disable_progress_bar()
    heartbeat = HeartbeatMonitor(
        topology, silence=_SILENCE, advice="The evaluation stops here; start it again"
    )
    with process_group(topology, timeout=_PATIENCE), heartbeat:
        report = evaluate_on_ranks(options, topology)
        if report is not None:
            _write(report, options)


def evaluate_on_ranks(options: EvaluateOptions, topology: Topology) -> EvalReport | None:
    """Return the report on the first rank, None elsewhere. Collective."""
    settings = EvalSettings(
        tasks=options.tasks,
        include_path=options.include_path,
        data_dir=options.data_dir,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
    )
    tasks: dict[str, Any] = {}
    # Before weights are read: a misspelt name should not cost minutes.
    on_first_rank(topology, lambda: tasks.update(find_tasks(settings)))
    lm = _lm(options, topology)
    if not topology.is_first:
        lm.rank_pool.serve()
        return None
    try:
        report = evaluate_lm(lm, tasks, settings, paired=not options.unpaired)
    except MegaskipError as error:
        lm.rank_pool.dismiss(error)
        raise
    lm.rank_pool.dismiss()
    return report


def _lm(options: EvaluateOptions, topology: Topology) -> MegaskipLM:
    placement = Placement(topology=topology, ds_content=_ds_content(options))
    loaded = load_for_inference(options.model, placement, dtype=options.dtype, base=options.base)
    if options.capacity is not None:
        if loaded.routers is None:
            raise ConfigError(f"--capacity: --model {options.model} has no routers")
        loaded.routers.set_capacity(options.capacity)
    ranks = f"{topology.world_size} rank(s), {topology.device.type}"
    logger.info("%s, %s on %s", loaded.description, placement, ranks)
    shares = {"share": topology.replica, "shares": topology.num_replicas}
    runner: Runner
    if loaded.staged is not None:
        runner = StageRunner(loaded.staged, loaded.routers, **shares)
    else:
        lock_step = placement.ds_content is not None
        runner = LocalRunner(loaded.model, loaded.routers, lock_step=lock_step, **shares)
    tokenizer = other_tokenizer(options.tokenizer, Path(options.model), loaded.folder)
    tokenizer = load_tokenizer(loaded.folder) if tokenizer is None else tokenizer
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    if tokenizer.chat_template and not options.apply_chat_template:
        logger.info("the tokenizer has a chat template; --apply_chat_template asks in it")
    return MegaskipLM(
        loaded.model,
        tokenizer,
        runner=runner,
        shape=loaded.shape,
        batch_size=options.batch_size,
        max_length=options.max_length,
        lm_eval_compatible=options.lm_eval_compatible,
    )


def _ds_content(options: EvaluateOptions) -> dict[str, Any] | None:
    content = read_ds_config(options.ds_config)
    if content is not None:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    return content


def _write(report: EvalReport, options: EvaluateOptions) -> None:
    for line in report.lines():
        logger.info("%s", line)
    write_json(options.output, {"model": options.model, **report.to_json(records=options.records)})
    logger.info("report: %s", options.output)
