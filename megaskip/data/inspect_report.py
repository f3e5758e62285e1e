"""Counts of an inspection: columns, reasons, lengths; and which rows to show. Prints nothing."""

import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megaskip.config import DataConfig
from megaskip.data.inspect import ERRORS, InspectedRow, SampleOutcome
from megaskip.data.plan import RowPlan, plan_rows
from megaskip.data.row import Row
from megaskip.data.source import Source
from megaskip.data.stats import SourceStats, check_losses
from megaskip.data.store import content_hash
from megaskip.data.vocabulary import require_known_token
from megaskip.errors import DataError

EXAMPLES = 3
"""Rows that are kept as examples of each reason for which rows are dropped."""

TRAINED = "trained on"
HELD_OUT = "held out"
COPY = "same tokens as a held-out row"
NOT_DRAWN = "not drawn: the weight of its source is below 1"


@dataclass(kw_only=True, slots=True)
class SourceReport:
    """What is known of one source."""

    source: Source
    stats: SourceStats
    """Of the samples that could be tokenised; the columns of all rows that fit the format."""
    formats: Counter[str] = field(default_factory=Counter)
    """Format of each row; the first good row decides it, so there is one at most."""
    rows_by_file: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Reason -> rows of the file that are dropped for it."""
    examples: dict[str, list[InspectedRow]] = field(default_factory=dict)
    """Reason -> its first rows."""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each row that is used."""
    pooled: "array[int]" = field(default_factory=lambda: array("i"))
    """Of these, what a sequence router with pool=prompt reads."""
    starts: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """First two tokens of a sample -> how often."""
    begins: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """First token of every stretch that is learnt -> how often; plain text is left out."""
    ends: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Last token of every such stretch, unless it was cut off."""

    @property
    def num_read(self) -> int:
        """Rows of the files, bad ones too."""
        return sum(self.rows_by_file.values())

    @property
    def num_used(self) -> int:
        """Rows of the files that give at least one row of tokens."""
        return self.num_read - sum(self.reasons.values())

    @property
    def num_parsed(self) -> int:
        """Rows of the files that fit the format."""
        return sum(self.formats.values())

    def add(self, outcome: SampleOutcome, prompt_tokens: int) -> None:
        """Count one row of a file."""
        parsed = outcome.parsed
        self.rows_by_file[parsed.place.file] += 1
        if not isinstance(parsed.sample, DataError) and parsed.fields is not None:
            self.formats[parsed.format_name] += 1
            self.stats.columns.add(parsed.fields)
        if outcome.tokenised is not None:
            self.stats.add(outcome.tokenised)
        for inspected in outcome.rows:
            if inspected.row is None:
                self.reasons[inspected.reason] += 1
                examples = self.examples.setdefault(inspected.reason, [])
                examples += [inspected] if len(examples) < EXAMPLES else []
            else:
                if inspected.window == 1:
                    self.starts[tuple(inspected.row.input_ids[:2].tolist())] += 1
                self._count_tokens(inspected.row, inspected.truncated, prompt_tokens)

    def _count_tokens(self, row: Row, truncated: bool, prompt_tokens: int) -> None:
        self.lengths.append(len(row))
        self.pooled.append(row.num_pooled(prompt_tokens))
        if not row.prompt_length:
            return
        edges = np.diff(row.supervised.astype(np.int8), prepend=0, append=0)
        ids = row.input_ids
        self.begins.update((token,) for token in ids[edges[:-1] == 1].tolist())
        ends = [(token,) for token in ids[np.flatnonzero(edges == -1) - 1].tolist()]
        self.ends.update(ends[:-1] if truncated and row.supervised[-1] else ends)


class RowPicker:
    """Keeps rows for showing: a sample in which every row so far is equally likely to be."""

    def __init__(self, wanted: int, seed: int) -> None:
        self._wanted = wanted
        self._random = random.Random(seed)
        self._seen = 0
        self._picked: list[tuple[int, InspectedRow]] = []

    def offer(self, row: InspectedRow) -> None:
        """Take the next row, or leave it (Vitter's algorithm R)."""
        slot = self._seen if self._seen < self._wanted else self._random.randrange(self._seen + 1)
        if slot < self._wanted:
            self._picked[slot : slot + 1] = [(self._seen, row)]
        self._seen += 1

    def picked(self) -> list[tuple[int, InspectedRow]]:
        """Return the kept rows, each with its index among all that were offered, in order."""
        return sorted(self._picked, key=lambda pair: pair[0])


class Inspection:
    """Collects outcomes in the order in which they are read, then says what training would do."""

    def __init__(
        self,
        config: DataConfig,
        sources: tuple[Sequence[Source], Sequence[Source]],
        *,
        rows: int,
    ) -> None:
        """`sources` are those of --data and of --eval_data; `rows` is how many to pick to show."""
        train, held_out = sources
        self.reports = [
            SourceReport(source=source, stats=SourceStats(name=source.name))
            for source in (*train, *held_out)
        ]
        self.picker = RowPicker(rows, config.seed)
        self.first_error: InspectedRow | None = None
        """The row at which training stops."""
        self.num_errors = 0
        self._config = config
        self._train = train
        self._hashes = array("Q")
        self._source_of = array("i")
        self._lengths = array("q")
        self._largest_token = 0

    @property
    def num_rows(self) -> int:
        """Rows of tokens so far."""
        return len(self._hashes)

    @property
    def num_repeated(self) -> int:
        """Rows of tokens that are the same as an earlier one."""
        return len(self._hashes) - len(set(self._hashes))

    def add(self, outcome: SampleOutcome) -> None:
        """Take in what became of one row of a file."""
        self.reports[outcome.source].add(outcome, self._config.prompt_tokens)
        for inspected in outcome.rows:
            if inspected.row is not None:
                self.picker.offer(inspected)
                self._hashes.append(content_hash(inspected.row))
                self._source_of.append(inspected.source)
                self._lengths.append(len(inspected.row))
                largest = int(inspected.row.input_ids.max())
                self._largest_token = max(self._largest_token, largest)
            elif inspected.reason in ERRORS:
                self.num_errors += 1
                self.first_error = self.first_error or inspected

    def refusals(self, vocabulary: int) -> list[str]:
        """Return why training would refuse the rows that are not wrong, for a model of `vocabulary`
        tokens; empty where it would not, or where there are none."""
        texts = []
        stats, num_train = [report.stats for report in self.reports], len(self._train)
        for group in (stats[:num_train], stats[num_train:]):
            try:
                if any(source.samples for source in group) or (group and not self.num_errors):
                    check_losses(group, seq_length=self._config.seq_length)
            except DataError as error:
                texts.append(str(error))
        try:
            require_known_token(self._largest_token, vocabulary)
        except DataError as error:
            texts.append(str(error))
        return texts

    def fates(self) -> "RowFates | None":
        """Return what training does with each row of tokens: None with --streaming, which plans
        nothing ahead. Raises DataError when no training row is left."""
        if self._config.streaming or not self._hashes:
            return None
        source_of = np.array(self._source_of, dtype=np.int32)
        plan = plan_rows(
            self._config,
            self._train,
            np.array(self._hashes, dtype=np.uint64),
            source_of,
            np.array(self._lengths, dtype=np.int64),
            num_train=int((source_of < len(self._train)).sum()),
        )
        return RowFates(plan, len(source_of))


class RowFates:
    """What a plan does with each row of tokens, by its index."""

    def __init__(self, plan: RowPlan, num_rows: int) -> None:
        self.plan = plan
        self._times = np.bincount(plan.train, minlength=num_rows)
        self._held_out = set(plan.held_out.tolist())
        self._copies = set(plan.duplicates.tolist())

    def __getitem__(self, index: int) -> str:
        """Return TRAINED, HELD_OUT, COPY or NOT_DRAWN."""
        if index in self._held_out:
            return HELD_OUT
        if index in self._copies:
            return COPY
        return TRAINED if self._times[index] else NOT_DRAWN

    @property
    def num_not_drawn(self) -> int:
        """Rows that are neither trained on nor held out, though no held-out row is like them."""
        return self.plan.num_not_drawn(len(self._times))

    def num_neighbours(self, index: int) -> int:
        """Return how many other samples share the row of a batch with it: 0 without --packing."""
        if self.plan.packs is None or not self._times[index]:
            return 0
        position = int(np.flatnonzero(self.plan.train == index)[0])
        return next(len(pack) - 1 for pack in self.plan.packs if position in pack)
