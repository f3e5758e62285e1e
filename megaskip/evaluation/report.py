"""The results of an evaluation: by document, by task, and as a table. Knows no model.

`Outcome` is one model's answers; `EvalReport` sets them beside those of the unrouted base.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megaskip.measures.costs import Cost, total
from megaskip.measures.paired import Aggregate, Difference, difference, standard_error
from megaskip.reporting.summary import aligned, or_dash


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document of a task."""

    index: int
    prompt_hash: str
    """Of the prompt, few-shot examples included."""
    answers: list[Any]
    """What the model answered to each of its requests: log-probabilities or text."""
    metrics: dict[str, Any]
    """By lm-eval's "metric,filter"."""
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """How a task's documents make a number."""

    value: float
    higher_is_better: bool
    aggregate: Aggregate | None
    """None for a mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOutcome:
    """One model's answers to a task."""

    documents: list[Document]
    metrics: dict[str, Metric]
    num_fewshot: int

    @property
    def cost(self) -> Cost:
        """Return what the documents cost together."""
        return total(document.cost for document in self.documents)

    def values(self, metric: str) -> list[Any]:
        """Return a metric's value of each document."""
        return [document.metrics[metric] for document in self.documents]

    def standard_error(self, metric: str) -> float | None:
        """Return the standard error of a metric over documents."""
        return standard_error(self.values(metric), self.metrics[metric].aggregate)

    def prompt_hash(self) -> str:
        """Return a hash of all prompts."""
        joined = "".join(document.prompt_hash for document in self.documents)
        return hashlib.sha256(joined.encode()).hexdigest()[:16]


Outcome = dict[str, TaskOutcome]
"""By task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """A model's answers, and its base's to the same requests."""

    outcome: Outcome
    dense: Outcome | None
    """The same model with every gate open; None where there is nothing to compare."""
    about: dict[str, Any] = field(default_factory=dict)

    def difference(self, task: str, metric: str) -> Difference | None:
        """Return routed minus dense, paired by document."""
        if self.dense is None or len(self.outcome[task].documents) < 2:
            return None  # one document has no interval
        ours, theirs = self.outcome[task], self.dense[task]
        if ours.prompt_hash() != theirs.prompt_hash():
            raise ValueError(f"{task}: the two models were asked different things")
        return difference(
            ours.values(metric), theirs.values(metric), ours.metrics[metric].aggregate
        )

    def skip_ratio(self) -> float | None:
        """Return the share of routed units that were skipped, over all tasks."""
        return total(task.cost for task in self.outcome.values()).skip_ratio

    def to_json(self, *, records: bool = False) -> dict[str, Any]:
        """Return everything, with each document if `records`."""
        tasks = {name: self._task_json(name, records) for name in self.outcome}
        return {**self.about, "skip_ratio": self.skip_ratio(), "tasks": tasks}

    def _task_json(self, name: str, records: bool) -> dict[str, Any]:
        task = self.outcome[name]
        cost = task.cost
        content: dict[str, Any] = {
            "documents": len(task.documents),
            "num_fewshot": task.num_fewshot,
            "prompt_hash": task.prompt_hash(),
            "skip_ratio": cost.skip_ratio,
            "flop_ratio": cost.flop_ratio,
            "kv_ratio": cost.kv_ratio,
            "metrics": {metric: self._metric_json(name, metric) for metric in task.metrics},
        }
        if records:
            content["records"] = self._records(name)
        return content

    def _metric_json(self, name: str, metric: str) -> dict[str, Any]:
        task, gap = self.outcome[name], self.difference(name, metric)
        content: dict[str, Any] = {
            "value": task.metrics[metric].value,
            "standard_error": task.standard_error(metric),
            "higher_is_better": task.metrics[metric].higher_is_better,
        }
        if self.dense is not None and gap is not None:
            content["dense"] = self.dense[name].metrics[metric].value
            content["difference"] = gap.value
            content["difference_95"] = [gap.low, gap.high]
        return content

    def _records(self, name: str) -> list[dict[str, Any]]:
        dense = (
            self.dense[name].documents if self.dense else [None] * len(self.outcome[name].documents)
        )
        return [
            {
                "index": ours.index,
                "prompt_hash": ours.prompt_hash,
                "answers": ours.answers,
                "metrics": _plain(ours.metrics),
                "skip_ratio": ours.cost.skip_ratio,
                "flop_ratio": ours.cost.flop_ratio,
                **({} if base is None else {"dense": _plain(base.metrics)}),
                **({} if base is None else {"dense_answers": base.answers}),
            }
            for ours, base in zip(self.outcome[name].documents, dense, strict=True)
        ]

    def lines(self) -> list[str]:
        """Return the table, a line for each metric of each task, and whose tokens were used."""
        rows = [_TITLES if self.dense else _TITLES[:4] + _TITLES[7:]]
        for name, task in self.outcome.items():
            for number, metric in enumerate(task.metrics):
                rows.append(self._cells(name, metric, is_first=number == 0))
        return [*_ruled(rows), _TOKENS[bool(self.about.get("lm_eval_compatible"))]]

    def _cells(self, name: str, metric: str, *, is_first: bool) -> list[str]:
        task, gap = self.outcome[name], self.difference(name, metric)
        error, cost = task.standard_error(metric), task.cost
        value = f"{task.metrics[metric].value:.4f}" + (f" ({error:.4f})" if error else "")
        arrow = "" if task.metrics[metric].higher_is_better else " (lower is better)"
        label = metric.removesuffix(",none") + arrow
        cells = [
            name if is_first else "",
            str(len(task.documents)) if is_first else "",
            label,
            value,
        ]
        if self.dense is not None:
            cells.append(f"{self.dense[name].metrics[metric].value:.4f}")
            cells += ["-", "-"] if gap is None else [f"{gap.value:+.4f}", _interval(gap)]
        skipped = cost.skip_ratio
        ratios = [or_dash(skipped, ".3f")]
        ratios += [f"{cost.flop_ratio:.3f}", f"{cost.kv_ratio:.3f}"]
        return cells + (ratios if is_first else ["", "", ""])


def _interval(gap: Difference) -> str:
    return f"[{gap.low:+.4f}, {gap.high:+.4f}]"


_TOKENS = {
    False: "texts become tokens as in training; --lm_eval_compatible gives lm-eval's own numbers",
    True: "texts become tokens as lm-eval makes them (--lm_eval_compatible)",
}

_TITLES = [
    *("task", "n", "metric", "value (std. error)", "dense", "difference", "95 % interval"),
    *("skipped", "FLOPs x", "KV x"),
]


def _ruled(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, the first one between rules."""
    lines = aligned(rows)
    rule = "-" * max(map(len, lines))
    return [rule, lines[0], rule, *lines[1:], rule]


def outcome_of(
    results: Mapping[str, Any], tasks: Mapping[str, Any], costs: Mapping[tuple[str, int], Cost]
) -> Outcome:
    """Return what lm-eval's results say, document by document."""
    return {
        name: _task_outcome(name, task, results, costs)
        for name, task in tasks.items()
        if name in results["samples"]
    }


def _plain(value: Any) -> Any:
    """Return what JSON can hold: metrics of lm-eval keep NumPy's numbers for their aggregation."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _task_outcome(
    name: str, task: Any, results: Mapping[str, Any], costs: Mapping[tuple[str, int], Cost]
) -> TaskOutcome:
    by_index: dict[int, Document] = {}
    for sample in results["samples"][name]:
        index = sample["doc_id"]
        document = by_index.setdefault(
            index,
            Document(
                index=index,
                prompt_hash=sample["prompt_hash"],
                answers=[answer for answers in sample["resps"] for answer in answers],
                metrics={},
                cost=costs[name, index],
            ),
        )
        for metric in sample["metrics"]:
            document.metrics[f"{metric},{sample['filter']}"] = sample[metric]
    documents = [by_index[index] for index in sorted(by_index)]
    metrics = {}
    for key in documents[0].metrics:
        metric = key.split(",")[0]
        aggregate = task.aggregation()[metric]
        metrics[key] = Metric(
            value=float(results["results"][name][key]),
            higher_is_better=bool(task.higher_is_better()[metric]),
            aggregate=None if aggregate.__name__ == "mean" else aggregate,
        )
    return TaskOutcome(
        documents=documents, metrics=metrics, num_fewshot=task.get_config("num_fewshot") or 0
    )
