"""How well a model, whose attention is skipped in some way, predicts each of many documents.

Shapes: B documents, T tokens, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from megaskip.arch.padding import needs_mask
from megaskip.data import Batch
from megaskip.data.collate import collate
from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.row import Row
from megaskip.data.vocabulary import padding_token, require_known_token
from megaskip.errors import DataError
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
    rows_per_document: int = 1,
) -> Scores:
    """Score every row of `batches`; the routers decide where there is no policy.

    To a policy `rows_per_document` neighbouring rows are one document, so that it treats the
    sentences of a pair alike.
    """
    columns: list[Tensor] = []
    masked = needs_mask(model, routers)
    first = 0
    for batch in batches:
        rows = len(batch.input_ids)
        documents = [row // rows_per_document for row in range(first, first + rows)]
        with routers.override({} if policy is None else policy(documents)):
            columns.append(_score_batch(model, routers, batch, masked))
        first += rows
    nll, tokens, exact, read, units, *kept = torch.cat(columns, dim=1).double().cpu().numpy()
    return Scores(nll=nll, tokens=tokens, exact=exact, read=read, units=units, kept=np.stack(kept))


def read_pairs(folder: Path, limit: int) -> dict[str, list[tuple[str, str]]]:
    """Return {set: (good, bad) sentences} of a folder of JSONL files, `limit` pairs of each.

    Raises DataError for a folder without such files, and for a line that is no pair.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no .jsonl file with minimal pairs there")
    return {path.stem: list(_pairs_of(path, limit)) for path in files}


def text_batches(
    texts: Sequence[str], tokenizer: Any, *, prompt_tokens: int, vocabulary: int, size: int = 64
) -> list[Batch]:
    """Return texts as batches in which every token of a text is predicted, the first from what
    PlainTextEncoder.split begins it with.

    `vocabulary` is the rows of the model's embedding; raises DataError for a token beyond it.
    """
    encoder, pad_token_id = PlainTextEncoder(tokenizer), padding_token(tokenizer, vocabulary)
    rows = []
    for text in texts:
        begin, tokens = encoder.split(text)
        ids = [*begin, *tokens]
        require_known_token(max(ids), vocabulary, text=repr(text[:40]))
        supervised = np.arange(len(ids)) >= len(begin)
        rows.append(
            Row(
                input_ids=np.asarray(ids, dtype=np.int32),
                supervised=supervised,
                prompt_length=0,
                source=0,
            )
        )
    return [
        collate(rows[i : i + size], pad_token_id=pad_token_id, prompt_tokens=prompt_tokens)
        for i in range(0, len(rows), size)
    ]


def spread_documents(documents: Any, count: int) -> list[Any]:
    """Return `count` documents from all over the text, at even distances: the first ones of a file
    may be from one source, on which routers keep less or more than on the others."""
    total = len(documents)
    count = min(count, total)
    return [documents[index * total // count] for index in range(count)]


def pair_accuracy(scores: Scores) -> Numbers:
    """Return 1 for each pair whose good sentence is likelier; rows are good, bad, good, ..."""
    return (scores.nll[0::2] < scores.nll[1::2]).astype(np.float64)


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


def _pairs_of(path: Path, limit: int) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if number > limit:
                return
            if line.strip():
                yield _pair(line, f"{path}, line {number}")


def _pair(line: str, where: str) -> tuple[str, str]:
    try:
        row: Mapping[str, str] = json.loads(line)
        return row["sentence_good"], row["sentence_bad"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: expected an object with sentence_good and sentence_bad ({error!r})"
        ) from None
