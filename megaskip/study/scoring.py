"""How well a model, whose attention is skipped in some way, predicts each of many documents.

Shapes: B documents, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megaskip.arch.padding import needs_mask
from megaskip.data import Batch
from megaskip.labels import IGNORED
from megaskip.routing import RouterSet
from megaskip.study.baselines import Policy

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One value a row, in the order of the rows."""

    nll: Numbers
    """Summed negative log-likelihood of the supervised tokens, nats."""
    tokens: Numbers
    """How many those are."""
    exact: Numbers
    """1 where every supervised token is the most likely one: greedy decoding says the same."""
    read: Numbers
    """Tokens of the row."""
    units: Numbers
    """Units of decision of the row in each routed layer: 1, or its tokens."""
    kept: Numbers
    """Share of the units of each routed layer that ran, [R, rows]."""

    def loss(self) -> float:
        """Return the mean loss of a token, nats."""
        return float(self.nll.sum() / self.tokens.sum())


@torch.no_grad()
def score(
    model: nn.Module,
    routers: RouterSet,
    batches: Sequence[Batch],
    policy: Policy | None = None,
    *,
    documents: Sequence[int] | None = None,
) -> Scores:
    """Score every row of `batches`; the routers decide where there is no policy.

    To a policy rows of the same number in `documents` are one document, which it treats alike, such
    as the options of a question; without it each row is one.
    """
    columns: list[Tensor] = []
    masked = needs_mask(model, routers)
    first = 0
    for batch in batches:
        last = first + len(batch.input_ids)
        of_batch = range(first, last) if documents is None else documents[first:last]
        with routers.override({} if policy is None else policy(of_batch)):
            columns.append(_score_batch(model, routers, batch, masked))
        first = last
    nll, tokens, exact, read, units, *kept = torch.cat(columns, dim=1).double().cpu().numpy()
    return Scores(nll=nll, tokens=tokens, exact=exact, read=read, units=units, kept=np.stack(kept))


def spread_documents(documents: Any, count: int) -> list[Any]:
    """Return `count` documents from all over the text, at even distances: the first ones of a file
    may be from one source, on which routers keep less or more than on the others."""
    total = len(documents)
    count = min(count, total)
    return [documents[index * total // count] for index in range(count)]


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the file's name of each path; the whole path where others end alike."""
    names = [Path(path).name for path in paths]
    return [
        path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]


def _score_batch(model: nn.Module, routers: RouterSet, batch: Batch, masked: bool) -> Tensor:
    """Return [nll, tokens, exact, read, units, kept of R layers] of each row, float64 [5 + R,
    B]."""
    masks = (batch.token_mask, batch.prompt_mask, batch.segment_ids)
    routers.set_batch(*masks, batch.counts.segments)
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask if masked else None,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits[:, :-1]
    targets = batch.labels[:, 1:]
    real = targets != IGNORED
    # Flat: over a strided class dimension it takes eight times as long on a CPU.
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    exact = ((logits.argmax(-1) == targets) | ~real).all(1)
    decisions = list(routers.decisions().values())
    kept = [(d.keep * d.unit_mask).sum(1) / d.unit_mask.sum(1).clamp(min=1) for d in decisions]
    read, units = batch.token_mask.sum(1), decisions[0].unit_mask.sum(1)
    columns = [losses.sum(1), real.sum(1), exact, read, units, *kept]
    return torch.stack([column.double() for column in columns])
