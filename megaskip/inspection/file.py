"""All rows of an inspection as JSON lines."""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megaskip.checkpoint.atomic import new_text_file
from megaskip.data.inspect import InspectedRow, SampleOutcome
from megaskip.data.inspect_report import COPY, NOT_DRAWN, RowFates
from megaskip.data.row_text import (
    CONTEXT,
    CUT,
    CUT_ANSWER,
    LEARNT,
    PROMPT,
    PROMPT_LEARNT,
    RowReader,
)
from megaskip.errors import ConfigError

# Half of a surrogate pair is written as its escape, which is what JSON has for it.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


class RowFile:
    """Writes rows while they are read, into a draft: what training does with each is known last.

    The file appears whole, when all went well; one that was there stays until then.
    """

    def __init__(self, path: Path, reader: RowReader, *, keep: Iterable[Path]) -> None:
        """Raises ConfigError when `path` cannot be written or is one of the files to `keep`."""
        self._path = path
        self._reader = reader
        if path.is_dir():
            raise ConfigError(f"--output {path} is a folder; name a .jsonl file")
        if path.exists() and any(path.samefile(file) for file in keep):
            raise ConfigError(f"--output {path} is a file of the data; give another name")
        try:
            self._draft = tempfile.TemporaryFile("w+", dir=path.parent, **_TEXT)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"--output {path}: cannot be written ({error.strerror or error})"
            ) from None

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._draft.close()

    def add(self, outcome: SampleOutcome) -> None:
        """Append the rows of one row of a file."""
        for row in outcome.rows:
            self._draft.write(json.dumps(row_record(self._reader, row), ensure_ascii=False) + "\n")

    def finish(self, fates: RowFates | None) -> None:
        """Write the file, with what training does with each row: copies of held-out rows and rows
        that a weight leaves out are dropped. Raises CheckpointError when the disk is full."""
        with new_text_file(self._path) as file:
            for record in self._records(fates):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _records(self, fates: RowFates | None) -> Iterator[dict[str, Any]]:
        index = 0
        self._draft.seek(0)
        for line in self._draft:
            record = json.loads(line)
            record["used_as"] = None
            if not record["dropped"]:
                fate = None if fates is None else fates[index]
                index += 1
                if fate in (COPY, NOT_DRAWN):
                    record |= {"dropped": True, "reason": fate}
                else:
                    record["used_as"] = fate
            yield record


def row_record(reader: RowReader, row: InspectedRow) -> dict[str, Any]:
    """Return a row as JSON: of a row that never became tokens, `text` is the row of the file."""
    record: dict[str, Any] = {"place": row.place, "format": row.parsed.format_name}
    text = reader.read(row)
    if text is None:
        fields = row.parsed.fields
        raw = "" if fields is None else json.dumps(fields.raw, ensure_ascii=False, default=str)
        record |= {"text": raw, "prompt": "", "learnt": [], "cut_off": ""}
        record |= {"tokens": 0, "prompt_tokens": 0, "learnt_tokens": 0}
    else:
        record |= {
            "text": text.text(PROMPT, PROMPT_LEARNT, LEARNT, CONTEXT),
            "prompt": text.text(PROMPT, PROMPT_LEARNT),
            "learnt": text.answers(),
            "cut_off": text.text(CUT, CUT_ANSWER),
            "tokens": text.length,
            "prompt_tokens": text.count(PROMPT, PROMPT_LEARNT),
            "learnt_tokens": text.count(LEARNT, PROMPT_LEARNT),
        }
    return record | {"dropped": row.row is None, "reason": row.message or None}
