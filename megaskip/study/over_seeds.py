"""What was measured of each document, averaged over seeds, and methods paired by document."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaskip.measures.costs import Cost, total
from megaskip.measures.paired import Difference, ratio_difference
from megaskip.study.agreement import Agreement
from megaskip.study.pareto import Contrast, Point
from megaskip.study.scoring import Scores, pair_accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The scores of every document under one way to skip."""

    text: Scores
    pairs: Scores | None
    """Of the sentences of the minimal pairs, good, bad, good, ..."""
    agreement: Agreement | None
    """Of greedy continuations with the dense model's."""
    latency: float | None
    """Of a prefill of the first held-out batch, over that of the dense model; None where it was
    not timed."""
    cost: Cost
    """Of the documents, counted."""


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
    nll, tokens, hits = mean_scores(measured, "nll"), dense.text.tokens, mean_hits(measured)
    dense_hits, exact = mean_hits([dense]), mean_scores(measured, "exact")
    gap = None
    if hits is not None and dense_hits is not None:
        gap = ratio_difference(hits, dense_hits, np.ones_like(hits))
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
        pairs=None if hits is None else float(hits.mean()),
        pairs_gap=gap,
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
        a, b = mean_hits(mine), mean_hits(theirs)
        both = a is not None and b is not None
        rows.append(
            Contrast(
                method=ours,
                against=method,
                skip=skip,
                loss=ratio_difference(
                    mean_scores(mine, "nll"), mean_scores(theirs, "nll"), mine[0].text.tokens
                ),
                pairs=ratio_difference(a, b, np.ones_like(a)) if both else None,
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


def mean_hits(measured: Sequence[Measured]) -> Any:
    """Return the pairs' hits averaged over seeds, None without pairs."""
    hits = [pair_accuracy(scores.pairs) for scores in measured if scores.pairs is not None]
    return np.mean(hits, axis=0) if hits else None
