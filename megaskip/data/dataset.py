"""From a DataConfig to training and held-out rows: tokenised once per machine, then shared."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megaskip.config import DataConfig
from megaskip.data.build_once import build_once
from megaskip.data.corpus import Job, read_samples, tokenise_all
from megaskip.data.demo import with_demo
from megaskip.data.fingerprint import fingerprint, require_unchanged, stamps_of
from megaskip.data.mix import interleave
from megaskip.data.plan import plan_rows
from megaskip.data.row import Row
from megaskip.data.source import Source, find_source
from megaskip.data.stats import DataStats, SourceStats, check_losses
from megaskip.data.store import (
    RowWriter,
    StoredRows,
    cache_errors,
    open_store,
    write_meta,
    write_plan,
)
from megaskip.data.streaming import StreamingRows, take_held_out
from megaskip.data.tokenize import SampleTokenizer
from megaskip.data.vocabulary import has_unknown_tokens, padding_token, require_known_token
from megaskip.errors import DataError
from megaskip.log import get_logger
from megaskip.progress import progress_bar

logger = get_logger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedData:
    """Everything a run reads."""

    train: StoredRows | StreamingRows
    """Rows by index; with --streaming an iterable instead."""
    held_out: StoredRows | list[Row]
    """Rows for the held-out loss: never packed; without --eval_data none of them is trained on."""
    stats: DataStats
    """With --streaming only what the held-out rows tell."""
    fingerprint: str


def build_dataset(config: DataConfig, tokenizer: Any) -> TokenizedData:
    """Return the data of a run, tokenising them unless an equal run has.

    Every rank calls this, before any process group exists: the first one on a machine tokenises,
    the others wait for its lock and read; machines that are ready wait --dist_timeout for the
    others. Raises DataError for unusable data.
    """
    sample_tokenizer = SampleTokenizer(
        tokenizer, seq_length=config.seq_length, template_file=config.chat_template
    )
    train, held_out = find_sources(config)
    before = stamps_of((*train, *held_out))
    key = fingerprint(config, tokenizer, sample_tokenizer, train, held_out)
    if config.streaming:
        data = _stream(config, sample_tokenizer, train, held_out, key)
        _log_notes(data.stats)
        return data
    root = Path(config.cache_dir or "~/.cache/megaskip/data").expanduser()
    folder = root / key
    if not folder.is_dir():

        def write(work: Path) -> None:
            _write(work, config, sample_tokenizer, train, held_out)
            require_unchanged(before)  # of files that were written to meanwhile nothing is kept

        build_once(folder, write)
    with cache_errors(root):
        rows, kept, stats = open_store(folder)
    stats = stats.of_sources((*train, *held_out))
    _log_notes(stats)
    return TokenizedData(train=rows, held_out=kept, stats=stats, fingerprint=key)


def data_for_model(
    config: DataConfig, tokenizer: Any, vocabulary: int
) -> tuple[TokenizedData, int]:
    """Return (the data of a run, a token to pad with) for a model with an embedding of `vocabulary`
    rows; as `build_dataset`, and raises DataError for tokens that the model does not know."""
    data = build_dataset(with_demo(config), tokenizer)
    return for_vocabulary(data, tokenizer, vocabulary), padding_token(tokenizer, vocabulary)


def _log_notes(stats: DataStats) -> None:
    for source in stats.sources:
        for note in source.notes():
            logger.info("%s", note)
    if warning := stats.warning():
        logger.warning("%s", warning)


def find_sources(config: DataConfig) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """Return the sources of --data and of --eval_data; raises DataError for one that is not
    there."""
    train = tuple(find_source(entry, streaming=config.streaming) for entry in config.data)
    held_out = tuple(
        find_source(entry, streaming=config.streaming, held_out=True) for entry in config.eval_data
    )
    for source in held_out:
        if source.weight != 1:
            raise DataError(f"--eval_data {source.name}: held-out data take no weight; remove it")
    return train, held_out


def for_vocabulary(data: TokenizedData, tokenizer: Any, vocabulary: int) -> TokenizedData:
    """Return `data` without tokens that a model with an embedding of `vocabulary` rows lacks.

    Raises DataError for stored and held-out rows that have one; the rows of a stream are checked as
    they are read.
    """
    # Going through all tokens takes time, and where the tokenizer knows no more it is not needed.
    if not has_unknown_tokens(tokenizer, vocabulary):
        return data
    if isinstance(data.train, StoredRows):
        require_known_token(data.train.largest_token(), vocabulary)
        return data
    for row in data.held_out:
        assert isinstance(row, Row)
        require_known_token(int(row.input_ids.max()), vocabulary)
    return replace(data, train=replace(data.train, vocabulary=vocabulary))


def _write(
    work: Path,
    config: DataConfig,
    tokenizer: SampleTokenizer,
    train: Sequence[Source],
    held_out: Sequence[Source],
) -> None:
    stats = [SourceStats(name=source.name) for source in (*train, *held_out)]
    jobs = islice(_jobs(train, stats, first=0), config.max_samples)
    with RowWriter(work) as writer:
        _tokenise(jobs, writer, stats, tokenizer, config)
        check_losses(stats[: len(train)], seq_length=config.seq_length)
        num_train = len(writer.sources)
        if held_out:
            _tokenise(_jobs(held_out, stats, first=len(train)), writer, stats, tokenizer, config)
            check_losses(stats[len(train) :], seq_length=config.seq_length)
    lengths = np.diff(writer.starts)
    plan = plan_rows(config, train, writer.hashes, writer.sources, lengths, num_train=num_train)
    write_plan(work, train=plan.train, packs=plan.packs, held_out=plan.held_out)
    write_meta(
        work,
        DataStats(
            sources=tuple(stats),
            train_rows=plan.num_train_rows,
            train_tokens=int(lengths[plan.train].sum()),
            held_out_rows=len(plan.held_out),
            duplicates_of_held_out=len(plan.duplicates),
            held_out_in_training=plan.leaked,
            not_drawn=plan.num_not_drawn(len(lengths)),
            repeated_rows=len(lengths) - len(np.unique(writer.hashes)),
        ),
    )


def read_in_turns(streams: Sequence[Iterator[T]], *, first: int) -> Iterator[tuple[int, T]]:
    """Yield (index of the source, counted from `first`; what its stream gives) of all in turns.

    Sources take turns so that --max_samples is a cut through all of them.
    """

    def numbered(index: int) -> Iterator[tuple[int, T]]:
        return ((first + index, item) for item in streams[index])

    return interleave([numbered(i) for i in range(len(streams))], rates=[1.0] * len(streams))


def _jobs(sources: Sequence[Source], stats: Sequence[SourceStats], *, first: int) -> Iterator[Job]:
    """Yield the samples of sources in turns; `stats` are those of all sources."""
    streams = [
        read_samples(source, counts.columns)
        for source, counts in zip(sources, stats[first:], strict=False)
    ]
    return read_in_turns(streams, first=first)


def _tokenise(
    jobs: Iterable[Job],
    writer: RowWriter,
    stats: Sequence[SourceStats],
    tokenizer: SampleTokenizer,
    config: DataConfig,
) -> None:
    done = tokenise_all(jobs, tokenizer, workers=config.tokenize_workers)
    for index, tokenised in progress_bar(done, desc="tokenising", unit=" samples"):
        stats[index].add(tokenised)
        for row in tokenised.rows:
            writer.append(row)


def _stream(
    config: DataConfig,
    tokenizer: SampleTokenizer,
    train: tuple[Source, ...],
    held_out: tuple[Source, ...],
    key: str,
) -> TokenizedData:
    stream = StreamingRows(
        sources=train,
        tokenizer=tokenizer,
        seq_length=config.seq_length,
        seed=config.seed,
        packing=config.packing,
        max_samples=config.max_samples,
    )
    stats = [SourceStats(name=source.name) for source in (*train, *held_out)]
    if held_out:
        jobs = _jobs(held_out, stats, first=len(train))
        kept: list[Row] = []
        for index, tokenised in tokenise_all(jobs, tokenizer, workers=config.tokenize_workers):
            stats[index].add(tokenised)
            kept += tokenised.rows
    else:
        kept, stream = take_held_out(stream, config.held_out)
    known = DataStats(
        sources=tuple(stats),
        train_rows=0,
        train_tokens=0,
        held_out_rows=len(kept),
        streamed=True,
    ).of_sources((*train, *held_out))
    return TokenizedData(train=stream, held_out=kept, stats=known, fingerprint=key)
