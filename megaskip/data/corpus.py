"""Samples of a source, tokenised here or in worker processes. Knows no cache and no mixing."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice

from megaskip.data.columns import ColumnCounts
from megaskip.data.fields import Fields, Place
from megaskip.data.formats import Sample, detect_format, normalise
from megaskip.data.source import Source, read_every_row
from megaskip.data.tokenize import SampleTokenizer, Tokenised
from megaskip.errors import DataError

_CHUNK = 64
"""Samples sent to a worker at a time."""

Job = tuple[int, Sample]
"""Index of the source, and one of its samples."""

AnyJob = tuple[int, Sample | DataError]
"""The same, or the error of a row that holds no sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRow:
    """One row of a source and the sample that it holds."""

    place: Place
    fields: Fields | None = None
    """None where the row cannot be read."""
    format_name: str = ""
    sample: Sample | DataError
    """The error where the row holds no sample."""


def read_samples(source: Source, columns: ColumnCounts) -> Iterator[Sample]:
    """Yield the samples of a source and count its columns; the first row that holds no sample is a
    DataError."""
    for row in parse_rows(source):
        if isinstance(row.sample, DataError):
            raise row.sample
        if row.fields is not None:
            columns.add(row.fields)
        yield row.sample


def parse_rows(source: Source) -> Iterator[ParsedRow]:
    """Yield every row of a source, bad ones too. The first row whose keys belong to a format tells
    the format of all that follow."""
    format_name = ""
    for place, row in read_every_row(source):
        if isinstance(row, DataError):
            yield ParsedRow(place=place, sample=row)
            continue
        fields = Fields(row, place)
        sample: Sample | DataError
        try:
            format_name = format_name or detect_format(fields)
            sample = normalise(fields, format_name=format_name)
        except DataError as error:
            sample = error
        yield ParsedRow(place=place, fields=fields, format_name=format_name, sample=sample)


def tokenise_all(
    jobs: Iterable[Job], tokenizer: SampleTokenizer, *, workers: int
) -> Iterator[tuple[int, Tokenised]]:
    """Yield each job's source index and rows, in the order of `jobs` for any number of workers.

    The first sample that cannot be tokenised is a DataError.
    """
    for source, result in try_all(jobs, tokenizer, workers=workers):
        if isinstance(result, DataError):
            raise result
        yield source, result


def try_all(
    jobs: Iterable[AnyJob], tokenizer: SampleTokenizer, *, workers: int
) -> Iterator[tuple[int, Tokenised | DataError]]:
    """Yield as `tokenise_all` does, but an error in the place of the rows of a bad sample."""
    if workers == 1:
        for job in jobs:
            yield _try(job, tokenizer)
        return
    # fork: the workers inherit the tokenizer, and no process group or device exists yet.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(tokenizer,)
    )
    jobs = iter(jobs)
    with executor:
        while block := list(islice(jobs, _CHUNK * workers * 4)):
            try:
                yield from executor.map(_try_inherited, block, chunksize=_CHUNK)
            except BrokenProcessPool as error:
                raise DataError(
                    "a tokenising process died, probably for lack of memory. Lower "
                    "--tokenize_workers"
                ) from error


def _try(job: AnyJob, tokenizer: SampleTokenizer) -> tuple[int, Tokenised | DataError]:
    source, sample = job
    if isinstance(sample, DataError):
        return source, sample
    try:
        return source, tokenizer.tokenise(sample, source=source)
    except DataError as error:
        return source, error


# The one global: a pool's function has no other way to reach what its process inherited.
_inherited: list[SampleTokenizer] = []


def _inherit(tokenizer: SampleTokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started them
    _inherited[:] = [tokenizer]


def _try_inherited(job: AnyJob) -> tuple[int, Tokenised | DataError]:
    return _try(job, _inherited[0])
