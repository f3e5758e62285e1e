"""From a model and task names to a report: what is loaded, checked and run, in order."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaskip.data.template import choose_template
from megaskip.errors import ConfigError
from megaskip.evaluation.lm import MegaskipLM
from megaskip.evaluation.report import EvalReport, Outcome, outcome_of
from megaskip.evaluation.runner import LocalRunner
from megaskip.evaluation.task_manager import load_tasks
from megaskip.extras import extra
from megaskip.measures.costs import Cost
from megaskip.reporting.summary import versions
from megaskip.routing import Routers

with extra("eval"):
    import lm_eval
    from datasets.utils.logging import disable_progress_bar


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """What is asked of a model, and how."""

    tasks: tuple[str, ...]
    """Bundled tasks, those under `include_path`, or lm-eval's own."""
    include_path: str | None = None
    """Folder with further task files (YAML)."""
    data_dir: str | None = None
    """Folder with the files of the bundled local_* tasks."""
    num_fewshot: int | None = None
    """Examples in a prompt; None is the task's own number."""
    limit: int | None = None
    """Documents of each task; None is all."""
    apply_chat_template: bool = False


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    routers: Routers | None = None,
    batch_size: int = 8,
    dense: Outcome | None = None,
    paired: bool = True,
    lm_eval_compatible: bool = False,
    **settings: Any,
) -> EvalReport:
    """Evaluate a model in this process and return the report.

    `model` is an HF model in evaluation mode; its `skip_routers` are used unless `routers` are
    given; overrides of their decisions stay in force. With `paired` the unrouted model answers the
    same requests, or its answers are those of `dense`, an earlier report's. Texts become tokens as
    in training, or with `lm_eval_compatible` as in lm-eval. `settings` are those of EvalSettings.
    """
    quiet_lm_eval()
    asked = EvalSettings(tasks=tuple(tasks), **settings)
    found_tasks = find_tasks(asked)
    runner = None if routers is None else LocalRunner(model, routers)
    lm = MegaskipLM(
        model,
        tokenizer,
        runner=runner,
        batch_size=batch_size,
        lm_eval_compatible=lm_eval_compatible,
    )
    return evaluate_lm(lm, found_tasks, asked, dense=dense, paired=paired)


def quick_table(model: Any, tokenizer: Any, *, limit: int | None = None) -> list[str]:
    """Return the lines of a table of the tasks made for the embedded demo."""
    report = evaluate_model(
        model, tokenizer, ["demo"], limit=limit, apply_chat_template=True, batch_size=16
    )
    return report.lines()


def find_tasks(settings: EvalSettings) -> dict[str, Any]:
    """Return the tasks that are asked for, checked; raises ConfigError or DataError."""
    return load_tasks(
        settings.tasks,
        include_path=settings.include_path,
        data_dir=settings.data_dir,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )


def evaluate_lm(
    lm: MegaskipLM,
    tasks: dict[str, Any],
    settings: EvalSettings,
    *,
    dense: Outcome | None = None,
    paired: bool = True,
) -> EvalReport:
    """Evaluate what `lm` holds on `tasks`. The first rank calls it; the others serve."""
    if settings.apply_chat_template and not lm.tokenizer.chat_template:
        raise ConfigError(
            "--apply_chat_template: the tokenizer has no chat template; leave it out, or name a "
            "--tokenizer that has one"
        )
    if settings.apply_chat_template:
        choose_template(lm.tokenizer, origin="the tokenizer")
    outcome = _answers(lm, tasks, settings)
    if dense is None and paired and lm.runner.routers is not None:
        with lm.disabled():
            dense = _answers(lm, tasks, settings)
    about = {
        "settings": {name: getattr(settings, name) for name in settings.__slots__},
        "batch_size": lm.batch_size,
        "lm_eval_compatible": lm.lm_eval_compatible,
        "versions": {**versions(), "lm_eval": lm_eval.__version__},
    }
    return EvalReport(outcome=outcome, dense=dense if paired else None, about=about)


def _answers(lm: MegaskipLM, tasks: dict[str, Any], settings: EvalSettings) -> Outcome:
    lm.spent = defaultdict(Cost)
    lm.asks_in_chat = False
    results = lm_eval.evaluate(
        lm=lm,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=settings.limit,
        apply_chat_template=settings.apply_chat_template,
        fewshot_as_multiturn=settings.apply_chat_template,
        bootstrap_iters=0,  # errors and intervals are ours, paired by document
    )
    return outcome_of(results, tasks, lm.spent)


def quiet_lm_eval() -> None:
    """Keep lm-eval's log out of the run's; errors still come through."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
