"""What became of the data, in numbers, and when that is worth a warning or an error."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megaskip.data.columns import ColumnCounts
from megaskip.data.folder import summarise
from megaskip.data.source import Source
from megaskip.data.tokenize import Tokenised
from megaskip.errors import DataError
from megaskip.log import get_logger

logger = get_logger(__name__)

CUT_AWAY = "all that would be learnt lies beyond --seq_length"
UNLEARNABLE = "no text or assistant turn to learn"
_COUNTS = (
    "samples",
    "rows",
    "tokens",
    "supervised_tokens",
    "truncated",
    "cut_away",
    "unlearnable",
)


@dataclass(kw_only=True, slots=True)
class SourceStats:
    """Counts of one source, before weights and packing."""

    name: str
    samples: int = 0
    """Rows of the file that were read."""
    rows: int = 0
    """Tokenised rows: one per chat (one per answer where its template rewrites earlier turns), one
    per window of plain text."""
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    """Samples whose end was cut off at seq_length, but which still teach something."""
    cut_away: int = 0
    """Samples dropped because all of their supervised tokens lie beyond seq_length."""
    unlearnable: int = 0
    """Samples dropped because they have nothing to learn at any length."""
    columns: ColumnCounts = field(default_factory=ColumnCounts)
    left_out: str = ""
    """Files that are not read, and why."""

    @property
    def dropped(self) -> int:
        return self.cut_away + self.unlearnable

    @property
    def supervised_fraction(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def add(self, tokenised: Tokenised) -> None:
        """Count one sample."""
        self.samples += 1
        self.rows += len(tokenised.rows)
        self.tokens += sum(map(len, tokenised.rows))
        self.supervised_tokens += sum(int(row.supervised.sum()) for row in tokenised.rows)
        self.truncated += tokenised.truncated and not tokenised.dropped
        self.cut_away += tokenised.truncated and tokenised.dropped
        self.unlearnable += tokenised.dropped and not tokenised.truncated

    def line(self) -> str:
        """Return the counts as one line: rows read, used, cut, and dropped by reason."""
        cut = f" ({self.truncated:,} cut at --seq_length)" if self.truncated else ""
        reasons = {CUT_AWAY: self.cut_away, UNLEARNABLE: self.unlearnable}
        why = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.items() if count)
        dropped = f"{self.dropped:,} dropped{f' ({why})' if why else ''}"
        return (
            f"data {self.name}: {self.samples:,} rows read, {self.samples - self.dropped:,} used"
            f"{cut}, {dropped}; {self.tokens:,} tokens in {self.rows:,} rows, "
            f"{self.supervised_fraction:.1%} learnt"
        )

    def notes(self) -> list[str]:
        """Return what is not used of the source: columns and files, one line each."""
        notes = []
        if ignored := self.columns.ignored:
            shares = f"{self.columns.shares(ignored)} of the rows{self.columns.advice()}"
            notes.append(f"data {self.name}: columns that nothing reads: {shares}")
        if self.left_out:
            notes.append(f"data {self.name}: files left out: {self.left_out}")
        return notes


@dataclass(frozen=True, kw_only=True, slots=True)
class DataStats:
    """Counts of a whole data set."""

    sources: tuple[SourceStats, ...]
    """One per entry of --data, then one per entry of --eval_data: Row.source is the index."""
    train_rows: int
    """Rows of one epoch, after weights and packing."""
    train_tokens: int
    """Real tokens of one epoch, after weights."""
    held_out_rows: int
    duplicates_of_held_out: int = 0
    """Training rows left out because a held-out row has the same tokens."""
    held_out_in_training: int = 0
    """Rows of --eval_data with the same tokens as a training row."""
    not_drawn: int = 0
    """Training rows left out because the weight of their source is below 1."""
    repeated_rows: int = 0
    """Rows that have the same tokens as an earlier one."""
    streamed: bool = False
    """The counts are of the held-out data alone: the others are read while training."""

    def of_sources(self, sources: Sequence[Source]) -> "DataStats":
        """Return the same counts with the names of the sources and the files that they leave out:
        a cache holds what the run that wrote it knew."""
        pairs = zip(self.sources, sources, strict=True)
        return replace(
            self,
            sources=tuple(
                replace(stats, name=source.name, left_out=summarise(source.left_out))
                for stats, source in pairs
            ),
        )

    def warning(self) -> str:
        """Return what is wrong with the held-out rows, "" if nothing is."""
        if not self.held_out_in_training:
            return ""
        return (
            f"{self.held_out_in_training:,} of {self.held_out_rows:,} held-out rows are trained "
            "on, too, so their loss says little about other text: give other text as --eval_data, "
            "or leave it out"
        )

    @property
    def total(self) -> SourceStats:
        """The sum over sources."""
        return _total(self.sources)

    def lines(self) -> list[str]:
        """Return text for the head of a run: one line per source, one for the result."""
        lines = [source.line() for source in self.sources if source.samples]
        if self.streamed:
            lines += [
                f"data {source.name}: read while training"
                for source in self.sources
                if not source.samples
            ]
            return [*lines, f"{self.held_out_rows:,} rows held out"]
        counts = {
            "copies of held-out rows left out": self.duplicates_of_held_out,
            "not drawn for weights below 1": self.not_drawn,
            "with the same tokens as an earlier row": self.repeated_rows,
        }
        more = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return [
            *lines,
            f"training on {self.train_rows:,} rows an epoch ({self.train_tokens:,} tokens), "
            f"{self.held_out_rows:,} held out{more}",
        ]


def check_losses(sources: Sequence[SourceStats], *, seq_length: int) -> None:
    """Raise DataError when nothing is left to learn; warn when more than half is lost."""
    total = _total(sources)
    names = ", ".join(source.name for source in sources)
    if not total.samples:
        raise DataError(f"{names}: the data hold no samples at all. Check --data and --max_samples")
    reasons = (
        f"{total.cut_away} lost every supervised token to --seq_length {seq_length}, "
        f"{total.unlearnable} have no text or assistant turn to learn"
    )
    if not total.supervised_tokens:
        raise DataError(
            f"{names}: no supervised token is left in {total.samples} samples: {reasons}. Raise "
            "--seq_length, or check that the assistant turns carry the answers"
        )
    if 2 * total.dropped > total.samples:
        lost = f"{total.dropped} of {total.samples} samples are dropped"
        logger.warning("%s: %s: %s.", names, lost, reasons)


def _total(sources: Sequence[SourceStats]) -> SourceStats:
    return SourceStats(
        name="all", **{name: sum(getattr(s, name) for s in sources) for name in _COUNTS}
    )
