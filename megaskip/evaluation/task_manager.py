"""Finding tasks and checking them before anything runs. Knows lm-eval's tasks, not models."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaskip.config.checks import did_you_mean
from megaskip.errors import ConfigError, DataError
from megaskip.extras import extra

with extra("eval"):
    from lm_eval.tasks import TaskManager

BUNDLED = Path(__file__).parent / "tasks"
_FEWSHOT_SEED = 1234
"""Source: the fork of lm-eval that the method was published with, branch offset_by_id."""


def load_tasks(
    names: Sequence[str],
    *,
    include_path: str | None = None,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return lm-eval's tasks by name: the bundled ones, those under `include_path`, lm-eval's own.

    Few-shot examples are drawn by document. Raises ConfigError for names that are unknown and
    DataError for data that is missing or wrong.
    """
    manager = _manager(names, include_path, data_dir)
    try:
        loaded = manager.load(list(names))["tasks"]
    except (OSError, ConnectionError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"--tasks {','.join(names)}: cannot be loaded ({reason})") from None
    for name, task in loaded.items():
        _check_beams(name, task)
        _check_gold(name, task, limit)
        _set_fewshot(name, task, num_fewshot)
    return dict(loaded)


def _manager(names: Sequence[str], include_path: str | None, data_dir: str | None) -> Any:
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(f"--include_path {include_path}: no such folder")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ConfigError(f"--data_dir {data_dir}: no such folder")
    paths = [BUNDLED, *([Path(include_path)] if include_path else [])]
    metadata = {"data_dir": data_dir} if data_dir else {}
    # Indexing lm-eval's own tasks takes seconds; only runs that name one pay for it.
    for defaults in (False, True):
        manager = DocumentwiseManager(
            include_path=list(paths), include_defaults=defaults, metadata=dict(metadata)
        )
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise ConfigError(
        *(
            f"--tasks: there is no task {name!r}{did_you_mean(name, manager.all_tasks)}"
            for name in unknown
        )
    )


class DocumentwiseManager(TaskManager):
    """lm-eval's TaskManager whose tasks draw few-shot examples for each document by its index.

    lm-eval's own tasks draw them from one stream, so that they depend on how many documents came
    before: on the limit, the order and the number of processes.
    """

    def load(self, task_list: Any) -> Any:
        """Return the loaded tasks and groups."""
        loaded = super().load(task_list)
        for task in loaded["tasks"].values():
            _draw_by_document(task)
        return loaded


def _draw_by_document(task: Any) -> None:
    """Seed a task's few-shot sampler anew for each document.

    The two methods of the instance are wrapped: a class with an ABC among its bases cannot be
    exchanged.
    """
    iterate, context = task.doc_iterator, task.fewshot_context
    index_of: dict[int, int] = {}

    def doc_iterator(**kwargs: Any) -> Iterator[tuple[int, Any]]:
        index_of.clear()
        for index, document in iterate(**kwargs):
            # lm-eval holds on to the documents while it makes their prompts.
            index_of[id(document)] = index
            yield index, document

    def fewshot_context(doc: Any, *args: Any, **kwargs: Any) -> Any:
        seed = _FEWSHOT_SEED + index_of[id(doc)]
        task.fewshot_rnd = random.Random(seed)
        if hasattr(task, "sampler"):
            task.sampler.set_rnd(seed)
        return context(doc, *args, **kwargs)

    task.doc_iterator, task.fewshot_context = doc_iterator, fewshot_context


def _check_beams(name: str, task: Any) -> None:
    beams = (task.get_config("generation_kwargs") or {}).get("num_beams", 1)
    if beams > 1:
        raise ConfigError(
            f"task {name} asks for num_beams {beams}; what is skipped is counted for one row a "
            "prompt, so set num_beams to 1 in generation_kwargs"
        )


def _check_gold(name: str, task: Any, limit: int | None) -> None:
    """Raise DataError for an answer that is none of the choices: it would count as wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for index, document in task.doc_iterator(limit=limit):
        choices = task.doc_to_choice(document)
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        for answer in gold if isinstance(gold, list) else [gold]:
            known = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
            if not known:
                raise DataError(
                    f"task {name}, document {index}: its answer is {answer!r}, which is none of "
                    f"its {len(choices)} choices (0 to {len(choices) - 1}); mend the data or "
                    "doc_to_target in the task's YAML"
                )


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    """Set a task's number of examples; a task whose own number is 0 keeps it, as in lm-eval."""
    own = task.get_config("num_fewshot")
    count = own if num_fewshot is None or own == 0 else num_fewshot
    pool = len(getattr(getattr(task, "sampler", None), "df", ()) or ())
    if count and count >= pool:
        raise ConfigError(
            f"--num_fewshot {count}: task {name} has {pool} documents to draw examples from; it "
            "needs more than it draws"
        )
    task.set_config("num_fewshot", count or 0)
