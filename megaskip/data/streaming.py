"""Rows read and tokenised on the fly, in a deterministic order. Knows no cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from megaskip.data.corpus import Job, read_samples
from megaskip.data.mix import in_pass, interleave, num_passes
from megaskip.data.pack import pack_stream
from megaskip.data.row import PackedRow, Row
from megaskip.data.source import Source
from megaskip.data.stats import SourceStats, check_losses
from megaskip.data.store import content_hash
from megaskip.data.tokenize import SampleTokenizer
from megaskip.data.vocabulary import require_known_token
from megaskip.log import get_logger

logger = get_logger(__name__)

_FIRST_CHECK = 1000
"""Samples after which a stream says what became of them; it does again after ten times as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingRows:
    """One epoch of training rows as an iterable; iterating again starts again from the same row.

    Sources take turns in proportion to their weights, each in file order: shuffle the files first.
    """

    sources: tuple[Source, ...]
    tokenizer: SampleTokenizer
    seq_length: int
    seed: int
    packing: bool = False
    max_samples: int | None = None
    held_out: frozenset[int] = frozenset()
    """Content hashes of the held-out rows, which are left out wherever they turn up."""
    start: int = 0
    """Rows to pass over, as after a resume."""
    vocabulary: int | None = None
    """Rows of the model's embedding: a token beyond is an error. None where all are known."""
    said: set[str] = field(default_factory=set, compare=False)
    """What was logged of the counts so far, by whichever stream of the same rows."""

    def skip(self, rows: int) -> "StreamingRows":
        """Return the stream that begins `rows` rows later; those are tokenised and thrown away."""
        return replace(self, start=self.start + rows)

    def __iter__(self) -> Iterator[Row | PackedRow]:
        rows: Iterator[Row | PackedRow] = self._kept()
        if self.packing:
            rows = pack_stream(self._kept(), seq_length=self.seq_length)
        return islice(rows, self.start, None)

    def _kept(self) -> Iterator[Row]:
        for row in self._rows():
            if content_hash(row) not in self.held_out:
                yield row

    def _rows(self) -> Iterator[Row]:
        counts = [SourceStats(name=source.name) for source in self.sources]
        streams = [self._source_stream(index, counts) for index in range(len(self.sources))]
        weights = [source.weight for source in self.sources]
        jobs = islice(interleave(streams, rates=weights), self.max_samples)
        seen, checked = 0, _FIRST_CHECK
        try:
            for seen, (index, sample) in enumerate(jobs, start=1):
                tokenised = self.tokenizer.tokenise(sample, source=index)
                counts[index].add(tokenised)
                if seen == checked:
                    self._report(counts, f"the first {seen:,} rows of the stream")
                    checked *= 10
                for row in tokenised.rows:
                    if self.vocabulary is not None:
                        require_known_token(int(row.input_ids.max()), self.vocabulary)
                    yield row
        except GeneratorExit:  # no more rows are wanted
            if not self.said and seen:
                self._say(counts, f"the first {seen:,} rows of the stream")
            raise
        self._report(counts, "the whole stream")

    def _report(self, counts: Sequence[SourceStats], what: str) -> None:
        """Say what became of the rows, once; raise DataError when nothing is left to learn."""
        if what not in self.said:
            check_losses(counts, seq_length=self.seq_length)
            self._say(counts, what)

    def _say(self, counts: Sequence[SourceStats], what: str) -> None:
        self.said.add(what)
        for source in counts:
            for line in (source.line(), *source.notes()):
                logger.info("%s: %s", what, line)

    def _source_stream(self, index: int, counts: Sequence[SourceStats]) -> Iterator[Job]:
        source, columns = self.sources[index], counts[index].columns
        for number in range(num_passes(source.weight)):
            for position, sample in enumerate(read_samples(source, columns)):
                if in_pass(
                    position, weight=source.weight, number=number, seed=self.seed, source=index
                ):
                    yield index, sample


def take_held_out(stream: StreamingRows, wanted: int) -> tuple[list[Row], StreamingRows]:
    """Return the first `wanted` rows, at most a fifth of the data, and the stream without them."""
    first = list(islice(replace(stream, packing=False), 5 * wanted))
    distinct: dict[int, Row] = {}
    for row in first:
        assert isinstance(row, Row)
        distinct.setdefault(content_hash(row), row)
    chosen = dict(islice(distinct.items(), min(wanted, len(first) // 5)))
    return list(chosen.values()), replace(stream, held_out=frozenset(chosen))
