"""What every row of the data becomes, bad rows too. Goes on where training stops; prints nothing.

Reads, parses, tokenises and plans with the same functions as `build_dataset`.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from megaskip.config import DataConfig
from megaskip.data.corpus import AnyJob, ParsedRow, parse_rows, try_all
from megaskip.data.dataset import find_sources, read_in_turns
from megaskip.data.formats import Sample
from megaskip.data.row import Row
from megaskip.data.stats import CUT_AWAY, UNLEARNABLE
from megaskip.data.tokenize import SampleTokenizer, Tokenised
from megaskip.errors import DataError

UNREADABLE = "cannot be read"
NO_FORMAT = "belongs to no known format"
MALFORMED = "does not fit the format"
NOT_TOKENISED = "does not fit the chat template"

ERRORS = (UNREADABLE, NO_FORMAT, MALFORMED, NOT_TOKENISED)
"""Reasons for which training does not start; the other rows are dropped and counted."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InspectedRow:
    """A row that training reads, or a row of a file that it drops or stops at."""

    source: int
    """Index of the source: those of --data first, then those of --eval_data."""
    parsed: ParsedRow
    row: Row | None = None
    """None where the row is dropped or wrong."""
    window: int = 1
    """Which of the rows of its sample this is: plain text has one for each seq_length tokens, a
    chat one for each answer where its template rewrites earlier turns."""
    windows: int = 1
    reason: str = ""
    """Why there is no row: one of the reasons above; empty where there is one."""
    error: DataError | None = None
    truncated: bool = False
    """The end was cut off at seq_length, but something is still learnt."""

    @property
    def place(self) -> str:
        """File and line, and which row it is where a sample gives several."""
        if self.windows == 1:
            return str(self.parsed.place)
        sample = self.parsed.sample
        unit = "answer" if isinstance(sample, Sample) and sample.messages else "window"
        return f"{self.parsed.place}, {unit} {self.window} of {self.windows}"

    @property
    def message(self) -> str:
        """The reason in full, without the place."""
        if self.error is None:
            return self.reason
        text = str(self.error).removeprefix(str(self.parsed.place)).lstrip(":, ")
        return f"{self.reason}: {text}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleOutcome:
    """One row of a file and the rows of tokens that it gives."""

    source: int
    parsed: ParsedRow
    tokenised: Tokenised | None
    """None where the row is wrong."""
    rows: tuple[InspectedRow, ...]
    """At least one; a single one without tokens where the sample is dropped or wrong."""


def inspect_samples(config: DataConfig, tokenizer: SampleTokenizer) -> Iterator[SampleOutcome]:
    """Yield what becomes of every row of the files that training would read, in its order.

    Raises DataError for a source that is not there; a bad row is an outcome, not an error.
    """
    train, held_out = find_sources(config)
    train_rows = islice(read_in_turns([*map(parse_rows, train)], first=0), config.max_samples)
    yield from _outcomes(train_rows, tokenizer, workers=config.tokenize_workers)
    held_out_rows = read_in_turns([*map(parse_rows, held_out)], first=len(train))
    yield from _outcomes(held_out_rows, tokenizer, workers=config.tokenize_workers)


def _outcomes(
    rows: Iterator[tuple[int, ParsedRow]], tokenizer: SampleTokenizer, *, workers: int
) -> Iterator[SampleOutcome]:
    waiting: deque[ParsedRow] = deque()

    def jobs() -> Iterator[AnyJob]:
        for source, parsed in rows:
            waiting.append(parsed)
            yield source, parsed.sample

    for source, result in try_all(jobs(), tokenizer, workers=workers):
        yield _outcome(source, waiting.popleft(), result)


def _outcome(source: int, parsed: ParsedRow, result: Tokenised | DataError) -> SampleOutcome:
    rows: Iterable[InspectedRow]
    if isinstance(result, DataError):
        reason = _stage(parsed)
        rows = [InspectedRow(source=source, parsed=parsed, reason=reason, error=result)]
    elif result.dropped:
        reason = CUT_AWAY if result.truncated else UNLEARNABLE
        rows = [InspectedRow(source=source, parsed=parsed, reason=reason)]
    else:
        rows = (
            InspectedRow(
                source=source,
                parsed=parsed,
                row=row,
                window=number,
                windows=len(result.rows),
                truncated=result.truncated,
            )
            for number, row in enumerate(result.rows, start=1)
        )
    tokenised = None if isinstance(result, DataError) else result
    return SampleOutcome(source=source, parsed=parsed, tokenised=tokenised, rows=tuple(rows))


def _stage(parsed: ParsedRow) -> str:
    """Return the reason that tells at which stage of the pipeline a wrong row is refused."""
    if parsed.fields is None:
        return UNREADABLE
    if not isinstance(parsed.sample, DataError):
        return NOT_TOKENISED
    return MALFORMED if parsed.format_name else NO_FORMAT
