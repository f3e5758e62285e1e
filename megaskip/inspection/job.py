"""The job of `megaskip inspect-data`: reads the data once, and says what to print."""

import contextlib
import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from itertools import chain

from megaskip.config import DataConfig
from megaskip.config.commands.inspect_data import InspectOptions
from megaskip.data.dataset import find_sources
from megaskip.data.demo import with_demo
from megaskip.data.inspect import inspect_samples
from megaskip.data.inspect_report import Inspection, RowFates
from megaskip.data.row_text import RowReader
from megaskip.data.tokenize import SampleTokenizer
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import DataError
from megaskip.inspection.file import RowFile
from megaskip.inspection.summary import plan_lines, source_lines, verdict_lines
from megaskip.inspection.view import View, row_lines
from megaskip.log import get_logger, quiet_libraries
from megaskip.parallel.loading.source import find_model_folder, resolve_source
from megaskip.progress import progress_bar

logger = get_logger(__name__)

_STREAMED = 10_000
"""Samples that are read of a stream, which may have no end, without --max_samples."""


def print_inspection(options: InspectOptions) -> None:
    """Print the summary and some rows, with colours if the output is a terminal and NO_COLOR is
    not set; write all rows to --output."""
    quiet_libraries()
    terminal = sys.stdout.isatty()
    view = View(
        colour=terminal and not os.environ.get("NO_COLOR"),
        width=min(shutil.get_terminal_size().columns, 160) if terminal else 100,
    )
    # Where the output cannot show a character, its escape is printed.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        for line in inspect_data(options, view):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough; what is buffered must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def inspect_data(options: InspectOptions, view: View) -> Iterator[str]:
    """Yield what is printed, and write --output on the way; raises DataError and ConfigError."""
    model = options.model
    source = resolve_source(model, find_model_folder(model, weights=False))
    tokenizer = load_tokenizer(
        model.tokenizer or source.folder, trust_remote_code=model.trust_remote_code
    )
    data = _limited(with_demo(options.data))
    sources = find_sources(data)
    sample_tokenizer = SampleTokenizer(
        tokenizer, seq_length=data.seq_length, template_file=data.chat_template
    )
    reader = RowReader(tokenizer, sample_tokenizer, data)
    inspection = Inspection(data, sources, rows=options.rows)
    outcomes = inspect_samples(data, sample_tokenizer)
    with contextlib.ExitStack() as stack:
        file = None
        if options.output is not None:
            read = [path for source in chain(*sources) for path in source.files]
            file = stack.enter_context(RowFile(options.output, reader, keep=read))
        for outcome in progress_bar(outcomes, desc="reading", unit=" samples"):
            inspection.add(outcome)
            if file is not None:
                file.add(outcome)
        refusals = inspection.refusals(source.text_config.vocab_size)
        fates = None
        try:
            fates = inspection.fates()
        except DataError as error:
            refusals.append(str(error))
        if file is not None:
            file.finish(fates)
    yield from _report(options, view, reader, inspection, fates, refusals)


def _limited(data: DataConfig) -> DataConfig:
    if not data.streaming or data.max_samples is not None:
        return data
    logger.warning("--streaming: the first %d samples; --max_samples reads more", _STREAMED)
    return dataclasses.replace(data, max_samples=_STREAMED)


def _report(
    options: InspectOptions,
    view: View,
    reader: RowReader,
    inspection: Inspection,
    fates: RowFates | None,
    refusals: list[str],
) -> Iterator[str]:
    for report in inspection.reports:
        yield from source_lines(view, report, reader)
    yield from plan_lines(view, inspection, fates)
    yield from verdict_lines(view, inspection, refusals)
    if options.rows:
        yield from view.legend()
        for index, row in inspection.picker.picked():
            fate = "" if fates is None else fates[index]
            neighbours = 0 if fates is None else fates.num_neighbours(index)
            yield from row_lines(view, reader, row, fate=fate, neighbours=neighbours)
        for report in inspection.reports:
            for examples in report.examples.values():
                for row in examples[: options.rows]:
                    yield from row_lines(view, reader, row)
    if options.rows and (inspection.num_errors or refusals):
        yield view.paint("Training would not start with these data; see above.", "1;31")
    if options.output is not None:
        yield f"all rows are in {options.output}"
