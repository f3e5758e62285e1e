"""What was measured of each document, averaged over seeds, and methods paired by document."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaskip.measures.costs import total
from megaskip.measures.paired import Difference, ratio_difference
from megaskip.study.measured import Measured
from megaskip.study.pareto import Contrast, Point, TaskResult
from megaskip.study.questions import PAIRS
from megaskip.study.scoring import Scores


def point_of(
    method: str,
    asked: float,
    measured: Sequence[Measured],
    dense: Measured,
    layers: Sequence[int],
    depth: int,
    domains: Sequence[str],
) -> Point:
    """Return a method's point: scores are averaged over seeds, then paired with dense.

    `layers` are the routed ones of `depth`, `domains` names the source of each document.
    """
    nll, tokens, exact = (
        mean_scores(measured, "nll"),
        dense.text.tokens,
        mean_scores(measured, "exact"),
    )
    tasks = {task: _task_result(measured, dense, task) for task in dense.answers}
    pairs = tasks.get(PAIRS)
    choices = [task for task in tasks if task != PAIRS]
    units = dense.text.units
    skipped = 1 - (mean_scores(measured, "kept") * units).sum(axis=1) / units.sum()
    cost = total(scores.cost for scores in measured)
    latencies = [scores.latency for scores in measured if scores.latency is not None]
    return Point(
        method=method,
        asked=asked,
        skipped=float(skipped.mean()) * len(layers) / depth,
        seeds=len(measured),
        loss=float(nll.sum() / tokens.sum()),
        loss_gap=ratio_difference(nll, dense.text.nll, tokens),
        pairs=None if pairs is None else pairs.acc,
        pairs_gap=None if pairs is None else pairs.acc_gap,
        choice=float(np.mean([tasks[task].acc_norm for task in choices])) if choices else None,
        choice_gap=_choice_difference(measured, [dense]),
        tasks=tasks,
        exact=float(exact.mean()),
        exact_gap=ratio_difference(exact, dense.text.exact, np.ones_like(exact)),
        flops=cost.flop_ratio,
        kv=cost.kv_ratio,
        latency=statistics.mean(latencies) if latencies else None,
        skipped_by_layer=dict(zip(layers, skipped.tolist(), strict=True)),
        domains=_gap_by_domain(nll, dense.text, np.array(domains)),
        same=mean_agreement(measured, "same"),
        likelihood=mean_agreement(measured, "likelihood"),
    )


def _gap_by_domain(nll: Any, dense: Scores, domains: Any) -> dict[str, Difference]:
    """Return the loss over the dense model's by source of the documents."""
    gaps = {}
    for domain in np.unique(domains):
        rows = domains == domain
        gaps[str(domain)] = ratio_difference(nll[rows], dense.nll[rows], dense.tokens[rows])
    return gaps


def mean_agreement(measured: Sequence[Measured], field: str) -> float | None:
    """Return the mean of a field of Agreement over prompts and seeds; None where there is none."""
    values = [getattr(m.agreement, field).mean() for m in measured if m.agreement is not None]
    return float(np.mean(values)) if values else None


def contrasts(
    measured: Mapping[tuple[str, float], Sequence[Measured]], ours: str
) -> list[Contrast]:
    """Return the method `ours` against each other method at equal skip, paired by document.

    `measured` has the scores of all seeds, by (method, asked share to skip).
    """
    rows = []
    for (method, skip), theirs in measured.items():
        mine = measured.get((ours, skip))
        if method == ours or not mine or not theirs:
            continue
        rows.append(
            Contrast(
                method=ours,
                against=method,
                skip=skip,
                loss=ratio_difference(
                    mean_scores(mine, "nll"), mean_scores(theirs, "nll"), mine[0].text.tokens
                ),
                pairs=_pairs_difference(mine, theirs),
                choice=_choice_difference(mine, theirs),
                exact=ratio_difference(
                    mean_scores(mine, "exact"),
                    mean_scores(theirs, "exact"),
                    np.ones(len(mine[0].text.exact)),
                ),
            )
        )
    return rows


def mean_scores(measured: Sequence[Measured], field: str) -> Any:
    """Return a field of the text's scores, averaged over seeds, by document."""
    return np.mean([getattr(scores.text, field) for scores in measured], axis=0)


def mean_right(measured: Sequence[Measured], task: str, field: str) -> Any:
    """Return a field of a task's Answers, averaged over seeds, by question."""
    return np.mean([getattr(scores.answers[task], field) for scores in measured], axis=0)


def _task_result(measured: Sequence[Measured], dense: Measured, task: str) -> TaskResult:
    right, norm = (mean_right(measured, task, field) for field in ("right", "right_norm"))
    before, before_norm = dense.answers[task].right, dense.answers[task].right_norm
    return TaskResult(
        questions=len(right),
        acc=float(right.mean()),
        acc_gap=ratio_difference(right, before, np.ones_like(right)),
        acc_norm=float(norm.mean()),
        acc_norm_gap=ratio_difference(norm, before_norm, np.ones_like(norm)),
    )


def _pairs_difference(mine: Sequence[Measured], theirs: Sequence[Measured]) -> Difference | None:
    if PAIRS not in mine[0].answers:
        return None
    a, b = (mean_right(measured, PAIRS, "right") for measured in (mine, theirs))
    return ratio_difference(a, b, np.ones_like(a))


def _choice_difference(mine: Sequence[Measured], theirs: Sequence[Measured]) -> Difference | None:
    """Return the difference of the mean acc_norm of the multiple-choice tasks, each of which counts
    alike whatever its number of questions; None where there are none."""
    tasks = [task for task in mine[0].answers if task != PAIRS]
    if not tasks:
        return None
    a, b = (
        [mean_right(measured, task, "right_norm") for task in tasks] for measured in (mine, theirs)
    )
    weights = np.concatenate([np.full(len(right), 1 / (len(right) * len(tasks))) for right in a])
    return ratio_difference(np.concatenate(a) * weights, np.concatenate(b) * weights, weights)
