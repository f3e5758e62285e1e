"""The summary of an inspection: columns, reasons, lengths, what training would do."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megaskip.data.folder import summarise
from megaskip.data.inspect import ERRORS
from megaskip.data.inspect_report import Inspection, RowFates, SourceReport
from megaskip.data.row_text import RowReader
from megaskip.inspection.view import View, escape, token_text

_RED, _YELLOW, _BOLD = "31", "33", "1"
_LISTED = 12
"""Names of columns or files that are listed; more are counted."""
_NAME = 17


def source_lines(view: View, report: SourceReport, reader: RowReader) -> Iterator[str]:
    """Yield what is known of one source."""
    yield view.title(f"data {report.source.name}")
    yield _line("format", _format(report))
    yield from _files(view, report)
    if (
        len(report.stats.columns.filled) > 1
        or report.num_parsed
        and "plain text" not in report.formats
    ):
        yield from _columns(view, report)
    cut, used, dropped = report.stats.truncated, report.num_used, report.num_read - report.num_used
    cut_text = f" ({cut:,} cut at --seq_length)" if cut else ""
    yield _line("rows", f"{report.num_read:,} read: {used:,} used{cut_text}, {dropped:,} dropped")
    for reason, count in report.reasons.most_common():
        colour = _RED if reason in ERRORS else _YELLOW
        yield _line("", view.paint(f"{count:,} dropped: {reason}", colour))
        example = report.examples[reason][0]
        detail = example.message.removeprefix(reason).lstrip(": ")
        text = f"first {example.place}{': ' if detail else ''}{detail}"
        yield from view.wrapped(text, "", " " * (_NAME + 5))
    if report.lengths:
        yield from _tokens(view, report, reader)


def _format(report: SourceReport) -> str:
    """Return the format of the rows, or the one that their columns tell where no row fits it."""
    told = {row.parsed.format_name for rows in report.examples.values() for row in rows} - {""}
    refused = f"{', '.join(sorted(told))}, but no row fits it"
    return ", ".join(report.formats) or (refused if told else "not known: no row fits a format")


def _files(view: View, report: SourceReport) -> Iterator[str]:
    folder = Path(report.source.name).expanduser()
    if report.source.files and report.source.files != (folder,):
        files = [
            f"{path.relative_to(folder) if folder.is_dir() else path} "
            f"({report.rows_by_file[str(path)]:,} rows)"
            for path in report.source.files
        ]
        yield _line("files read", escape(_listed(files)))
    if report.source.left_out:
        left_out = escape(summarise(report.source.left_out, shown=_LISTED))
        yield _line("files left out", view.paint(left_out, _YELLOW))


def _columns(view: View, report: SourceReport) -> Iterator[str]:
    columns = report.stats.columns
    ignored = columns.ignored
    yield _line("columns used", escape(columns.shares(columns.used)) or "none")
    text = f"{columns.shares(ignored)}{columns.advice()}"
    yield _line("columns ignored", view.paint(escape(text), _YELLOW) if ignored else "none")


def _tokens(view: View, report: SourceReport, reader: RowReader) -> Iterator[str]:
    stats = report.stats
    rows = f"{len(report.lengths):,} rows of tokens, " if stats.rows != report.num_used else ""
    yield _line("tokens per row", f"{rows}{_quantiles(report.lengths)}")
    yield _line("router reads", f"{_quantiles(report.pooled)} (tokens of a row, --pool prompt)")
    yield _line("learnt", f"{stats.supervised_fraction:.1%} of {stats.tokens:,} tokens")
    yield _line("rows begin", _starts(view, report, reader))
    if report.begins:
        yield _line("answers begin", _shares(report.begins, reader))
    if report.ends:
        yield _line("answers end", _shares(report.ends, reader))


def _starts(view: View, report: SourceReport, reader: RowReader) -> str:
    """Return how rows begin, with a warning where the tokenizer's own prefix is missing or
    doubled."""
    prefix, (start, _) = reader.prefix, report.starts.most_common(1)[0]
    text = _shares(report.starts, reader)
    is_single = start[: len(prefix)] == prefix[:2] and start[len(prefix) :][:1] != prefix[:1]
    if is_single or not prefix:
        return text
    own = "".join(token_text(reader.token(token)) for token in prefix)
    return view.paint(f"{text}; the tokenizer puts {own} before a text", _YELLOW)


def plan_lines(view: View, inspection: Inspection, fates: RowFates | None) -> Iterator[str]:
    """Yield what training does with the rows of tokens of all sources together."""
    yield view.title("what training does with them")
    total, repeated = inspection.num_rows, inspection.num_repeated
    if repeated:
        text = f"{repeated:,} of {total:,} rows have the same tokens as an earlier one"
        yield _line("repeated", view.paint(text, _YELLOW))
    if fates is None:
        return
    plan = fates.plan
    different = len(set(plan.train.tolist()))
    epoch = f": {len(plan.train):,} in an epoch" if len(plan.train) != different else ""
    yield _line("trained on", f"{different:,} of {total:,} rows of tokens{epoch}")
    if plan.packs is not None:
        yield _line("packed", f"into {len(plan.packs):,} rows of at most --seq_length tokens")
    yield _line("held out", f"{len(plan.held_out):,} rows")
    if len(plan.duplicates):
        yield _line("left out", f"{len(plan.duplicates):,} rows that are copies of held-out ones")
    if fates.num_not_drawn:
        yield _line("left out", f"{fates.num_not_drawn:,} rows for weights below 1")


def verdict_lines(view: View, inspection: Inspection, refusals: Sequence[str]) -> Iterator[str]:
    """Yield why training would not start, if it would not."""
    error, count = inspection.first_error, inspection.num_errors
    bad = f"{_BOLD};{_RED}"
    if error is not None:
        yield from view.wrapped(f"training stops at {error.place}: {error.message}", bad)
        if count > 1:
            yield view.paint(f"({count:,} rows are wrong; all of them count as dropped here)", _RED)
    for refusal in refusals:
        yield from view.wrapped(f"training refuses the data: {refusal}", bad)


def _line(name: str, text: str) -> str:
    return f"  {name:<{_NAME}} {text}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _quantiles(values: Sequence[int]) -> str:
    quantiles = np.quantile(np.asarray(values), [0, 0.1, 0.5, 0.9, 1])
    names = ("shortest", "10 %", "median", "90 %", "longest")
    return ", ".join(f"{n} {value:.0f}" for n, value in zip(names, quantiles, strict=True))


def _shares(counts: Counter[tuple[int, ...]], reader: RowReader) -> str:
    """Return the most common of short runs of tokens, with their shares."""
    total = sum(counts.values())
    shown = [
        f"{' '.join(token_text(reader.token(token)) for token in tokens)} {count / total:.0%}"
        for tokens, count in counts.most_common(4)
    ]
    return "with " + ", ".join(shown) + (" ..." if len(counts) > 4 else "")
