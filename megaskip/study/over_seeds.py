"""What was measured of each document, averaged over seeds, and methods paired by document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megaskip.measures.paired import ratio_difference
from megaskip.study.agreement import Agreement
from megaskip.study.pareto import Contrast
from megaskip.study.scoring import Scores, pair_accuracy


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The scores of every document under one way to skip."""

    text: Scores
    pairs: Scores | None
    """Of the sentences of the minimal pairs, good, bad, good, ..."""
    agreement: Agreement | None
    """Of greedy continuations with the dense model's."""
    latency: float
    """Of a prefill of the first held-out batch, over that of the dense model."""


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
