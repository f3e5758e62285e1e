"""What became of the data, in numbers, and when that is worth a warning or an error."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from megaskip.data.tokenize import Tokenised
from megaskip.errors import DataError
from megaskip.log import get_logger

logger = get_logger(__name__)


@dataclass(kw_only=True, slots=True)
class SourceStats:
    """Counts of one source, before weights and packing."""

    name: str
    samples: int = 0
    """Rows of the file that were read."""
    rows: int = 0
    """Tokenised rows: one per chat, one per window of plain text."""
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    """Samples whose end was cut off at seq_length, but which still teach something."""
    cut_away: int = 0
    """Samples dropped because all of their supervised tokens lie beyond seq_length."""
    unlearnable: int = 0
    """Samples dropped because they have nothing to learn at any length."""

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
    duplicates_of_held_out: int
    """Training rows left out because a held-out row has the same tokens."""

    def named(self, names: Iterable[str]) -> "DataStats":
        """Return the same counts under other names of the sources: a cache stores those of the run
        that wrote it."""
        pairs = zip(self.sources, names, strict=True)
        return replace(self, sources=tuple(replace(source, name=name) for source, name in pairs))

    @property
    def total(self) -> SourceStats:
        """The sum over sources."""
        return _total(self.sources)

    def lines(self) -> list[str]:
        """Return text for the head of a run: one line per source, one for the result."""
        lines = [
            f"data {s.name}: {s.samples} samples -> {s.rows} rows, {s.tokens} tokens, "
            f"{s.supervised_fraction:.1%} supervised; {s.truncated} truncated, {s.dropped} dropped"
            for s in self.sources
        ]
        return [
            *lines,
            f"training on {self.train_rows} rows an epoch ({self.train_tokens} tokens), "
            f"{self.held_out_rows} held out",
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
    if total.dropped:
        level = logging.WARNING if 2 * total.dropped > total.samples else logging.INFO
        lost = f"{total.dropped} of {total.samples} samples are dropped"
        logger.log(level, "%s: %s: %s.", names, lost, reasons)


def _total(sources: Sequence[SourceStats]) -> SourceStats:
    counts = [field.name for field in fields(SourceStats) if field.name != "name"]
    return SourceStats(
        name="all", **{name: sum(getattr(s, name) for s in sources) for name in counts}
    )
