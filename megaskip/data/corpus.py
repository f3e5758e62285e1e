"""Samples of a source, tokenised here or in worker processes. Knows no cache and no mixing."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from megaskip.data.formats import Sample, detect_format, normalise
from megaskip.data.source import Source, read_rows
from megaskip.data.tokenize import SampleTokenizer, Tokenised
from megaskip.errors import DataError

_CHUNK = 64
"""Samples sent to a worker at a time."""

Job = tuple[int, Sample]
"""Index of the source, and one of its samples."""


def read_samples(source: Source) -> Iterator[Sample]:
    """Yield the samples of a source. The first row's keys tell the format of all the others."""
    format_name = ""
    for place, fields in read_rows(source):
        format_name = format_name or detect_format(fields, place)
        yield normalise(fields, format_name=format_name, place=place)


def tokenise_all(
    jobs: Iterable[Job], tokenizer: SampleTokenizer, *, workers: int
) -> Iterator[tuple[int, Tokenised]]:
    """Yield each job's source index and rows, in the order of `jobs` for any number of workers."""
    if workers == 1:
        for source, sample in jobs:
            yield source, tokenizer.tokenise(sample, source=source)
        return
    # fork: the workers inherit the tokenizer, and no process group or device exists yet.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(tokenizer,)
    )
    jobs = iter(jobs)
    with executor:
        while block := list(islice(jobs, _CHUNK * workers * 4)):
            try:
                yield from executor.map(_tokenise_job, block, chunksize=_CHUNK)
            except BrokenProcessPool as error:
                raise DataError(
                    "a tokenising process died, probably for lack of memory. Lower "
                    "--tokenize_workers"
                ) from error


# The one global: a pool's function has no other way to reach what its process inherited.
_inherited: list[SampleTokenizer] = []


def _inherit(tokenizer: SampleTokenizer) -> None:
    _inherited[:] = [tokenizer]


def _tokenise_job(job: Job) -> tuple[int, Tokenised]:
    source, sample = job
    return source, _inherited[0].tokenise(sample, source=source)
