"""The job of launch/evaluate.py: flags, ranks, table and file."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from megaskip.checkpoint.atomic import why_unwritable, write_json
from megaskip.checkpoint.run_tokenizer import other_tokenizer
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, MegaskipError
from megaskip.evaluation.evaluate import EvalSettings, evaluate_lm, find_tasks, quiet_lm_eval
from megaskip.evaluation.lm import MegaskipLM
from megaskip.evaluation.report import EvalReport
from megaskip.evaluation.runner import LocalRunner, Runner, StageRunner
from megaskip.log import get_logger, quiet_libraries, set_up_logging
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

_LEAST = {"limit": 1, "batch_size": 1, "num_fewshot": 0, "pipeline_stages": 1, "max_length": 2}

_DESCRIPTION = """\
Evaluate a routed model with lm-eval, beside its unrouted base: the same requests are answered with
every gate open, and the difference is paired by document.

tasks: demo (demo_choice, demo_answers, demo_text: made for the embedded demo; use
       --apply_chat_template), local_blimp, local_arc_easy, local_arc_challenge, local_boolq,
       local_openbookqa, local_copa (read JSON lines under --data_dir), those under --include_path,
       and lm-eval's own (which download their data)

Under torchrun or deepspeed every rank holds the model and takes its share of the requests. For
models that fit no single GPU the weights are sharded by ZeRO-3 (--ds_config) or spread over stages
(--pipeline_stages). The results do not depend on the number of ranks.
"""


def main(argv: Sequence[str]) -> None:
    """Evaluate as the flags say. Every rank calls it."""
    options = parse(argv)
    topology = read_topology(os.environ, num_stages=options.pipeline_stages)
    set_up_logging(rank=topology.rank)
    quiet_libraries()
    quiet_lm_eval()
    transformers.utils.logging.disable_progress_bar()
    watch = HeartbeatMonitor(
        topology, silence=_SILENCE, advice="The evaluation stops here; start it again"
    )
    with process_group(topology, timeout=_PATIENCE), watch:
        report = evaluate_on_ranks(options, topology)
        if report is not None:
            _write(report, options)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, checked as far as they can be without reading anything large."""
    parser = argparse.ArgumentParser(
        prog="launch/evaluate.py",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model", required=True, help="exported, run, router or plain Hugging Face folder, or demo"
    )
    add("--base", help="base model of a run or router folder [what it names]")
    add(
        "--tokenizer", help="folder or hub id [of a run: what it was trained with; else the base's]"
    )
    add("--tasks", required=True, help="names, separated by commas")
    add("--include_path", help="folder with further task files (YAML)")
    add("--data_dir", help="folder with the files of the local_* tasks")
    add("--num_fewshot", type=int, help="examples in a prompt [the task's own number]")
    add("--limit", type=int, help="documents of each task [all]")
    add("--apply_chat_template", action="store_true", help="ask in the tokenizer's chat format")
    add("--batch_size", type=int, default=8, help="rows of a batch on a rank [8]")
    add("--max_length", type=int, help="tokens of a text [what the model says]")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="[as stored]")
    add("--capacity", type=float, help="one that tools/calibrate.py calibrated [the stored one]")
    add("--unpaired", action="store_true", help="do not run the unrouted base: half the time")
    add("--ds_config", help="DeepSpeed JSON: shard the weights over the ranks by ZeRO-3")
    stages = "ranks that hold one copy of the model, each some of its layers [1]"
    add("--pipeline_stages", type=int, default=1, metavar="S", help=stages)
    add("--output", required=True, help="write the report to this .json file")
    add("--records", action="store_true", help="write each document's answers, too")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args(argv)
    problems = [
        f"--{name} {value} must be at least {least}"
        for name, least in _LEAST.items()
        if (value := getattr(options, name)) is not None and value < least
    ]
    if options.ds_config and options.pipeline_stages > 1:
        problems.append("--ds_config shards by ZeRO-3, --pipeline_stages by layers; choose one")
    folder = Path(options.output).absolute().parent
    if not folder.is_dir():
        problems.append(f"--output {options.output}: there is no folder {folder}; make it first")
    if Path(options.output).is_dir():
        problems.append(f"--output {options.output} is a folder; name a .json file")
    elif folder.is_dir() and (why := why_unwritable(folder)):
        problems.append(f"--output {options.output}: cannot write there ({why})")
    if not _named(options.tasks):
        problems.append(f"--tasks {options.tasks!r} names no task")
    if problems:
        raise ConfigError(*problems)
    return options


def evaluate_on_ranks(options: argparse.Namespace, topology: Topology) -> EvalReport | None:
    """Return the report on the first rank, None elsewhere. Collective."""
    settings = EvalSettings(
        tasks=_named(options.tasks),
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
        lm.team.serve()
        return None
    try:
        report = evaluate_lm(lm, tasks, settings, paired=not options.unpaired)
    except MegaskipError as error:
        lm.team.dismiss(error)
        raise
    lm.team.dismiss()
    return report


def _lm(options: argparse.Namespace, topology: Topology) -> MegaskipLM:
    place = Placement(topology=topology, ds_content=_ds_content(options))
    loaded = load_for_inference(options.model, place, dtype=options.dtype, base=options.base)
    if options.capacity is not None:
        if loaded.routers is None:
            raise ConfigError(f"--capacity: --model {options.model} has no routers")
        loaded.routers.set_capacity(options.capacity)
    ranks = f"{topology.world_size} rank(s), {topology.device.type}"
    logger.info("%s, %s on %s", loaded.description, place, ranks)
    shares = {"share": topology.replica, "shares": topology.num_replicas}
    runner: Runner
    if loaded.staged is not None:
        runner = StageRunner(loaded.staged, loaded.routers, **shares)
    else:
        lock_step = place.ds_content is not None
        runner = LocalRunner(loaded.model, loaded.routers, lock_step=lock_step, **shares)
    tokenizer = other_tokenizer(options.tokenizer, Path(options.model), loaded.folder)
    tokenizer = load_tokenizer(loaded.folder) if tokenizer is None else tokenizer
    if tokenizer.chat_template and not options.apply_chat_template:
        logger.info("the tokenizer has a chat template; --apply_chat_template asks in it")
    return MegaskipLM(
        loaded.model,
        tokenizer,
        runner=runner,
        shape=loaded.shape,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def _ds_content(options: argparse.Namespace) -> dict[str, Any] | None:
    content = read_ds_config(options.ds_config)
    if content is not None:
        from megaskip.parallel.zero3 import prepare_deepspeed

        prepare_deepspeed()
    return content


def _named(tasks: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in tasks.split(",") if name.strip())


def _write(report: EvalReport, options: argparse.Namespace) -> None:
    for line in report.lines():
        logger.info("%s", line)
    write_json(
        Path(options.output), {"model": options.model, **report.to_json(records=options.records)}
    )
    logger.info("report: %s", options.output)
