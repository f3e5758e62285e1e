"""Fuzzed data: rows of every format, the bytes of their files, names of sources, chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_samples import CHATML, FORGETFUL, MARKED, fast_tokenizer, slow_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from mutations import ODD_TEXTS, changed_bytes, changed_json, changed_json_file
from outcome import ends_well, fuzzed

from megaskip.config import DataConfig
from megaskip.data import build_dataset
from megaskip.data.corpus import parse_rows
from megaskip.data.formats import FORMATS
from megaskip.data.inspect import inspect_samples
from megaskip.data.row_text import RowReader
from megaskip.data.source import find_source
from megaskip.data.tokenize import SampleTokenizer
from megaskip.errors import DataError
from megaskip.generation.prompts import read_prompts
from megaskip.inspection.file import row_record

CALL = {"name": "add", "arguments": {"a": 1, "b": None}}
TOOL = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ROWS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what is two"}], "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": CALL}]},
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"},
            {"role": "assistant", "content": "four", "weight": 1},
        ],
        "tools": [TOOL],
    },
    {
        "conversations": [
            {"from": "human", "value": "what is two"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "four", "train": True, "mask": 0},
        ],
        "system": "be brief",
        "tools": json.dumps([TOOL]),
    },
    {
        "instruction": "add",
        "input": "two",
        "output": "four",
        "system": "be brief",
        "history": [["hello", "world"]],
    },
    {"prompt": "what is", "completion": "four", "images": []},
    {"question": "what is two", "answer": "two", "context": ["two"], "system_prompt": "be brief"},
    {"text": "hello world how are you\n\ntoday"},
)
NAMES = ("rows.jsonl", "rows.json", "rows.txt", "rows.csv", "rows.tsv", "rows.JSONL")
DAMAGED = (
    "rows.jsonl.gz",
    "rows.csv.xz",
    "rows.json.bz2",
    "rows.txt.zst",
    "rows.parquet",
    "b.arrow",
)
"""Names of files that hold something else than what they say."""
FILES = NAMES + DAMAGED
TEMPLATES = (CHATML, MARKED, FORGETFUL, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    fast = [fast_tokenizer(template) for template in TEMPLATES]
    return [*fast, slow_tokenizer(tmp_path_factory.mktemp("slow"))]


def test_every_format_is_fuzzed() -> None:
    assert len(ROWS) == len(FORMATS)


def read_all(file: Path, tokenizer: Any) -> None:
    """Read and tokenise the rows of a file as training does, those behind a wrong one too."""
    with ends_well():
        source, samples = find_source(str(file)), SampleTokenizer(tokenizer, seq_length=32)
        for row in parse_rows(source):
            if isinstance(row.sample, DataError):
                assert len(str(row.sample)) < 4000
                continue
            with ends_well():
                tokenised = samples.tokenise(row.sample, source=0)
                assert all(len(made) <= 32 for made in tokenised.rows)


@fuzzed(250)
@given(
    st.lists(st.sampled_from(ROWS).flatmap(changed_json), min_size=1, max_size=3),
    st.integers(0, len(TEMPLATES)),
)
def test_rows(folder: Path, tokenizers: list[Any], rows: list[Any], tokenizer: int) -> None:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_all(file, tokenizers[tokenizer])


@fuzzed(150)
@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=3), st.sampled_from(FILES), st.data())
def test_files_of_rows(
    folder: Path, tokenizers: list[Any], rows: list[Any], name: str, data: st.DataObject
) -> None:
    lines = "\n".join(map(json.dumps, rows)).encode()
    file = folder / name
    file.write_bytes(data.draw(changed_bytes(lines) | changed_json_file(rows)))
    read_all(file, tokenizers[0])


@fuzzed(100)
@given(st.lists(st.sampled_from(ROWS).flatmap(changed_json), min_size=1, max_size=3))
def test_inspection_of_rows(folder: Path, tokenizers: list[Any], rows: list[Any]) -> None:
    file = folder / "inspected.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(data=(str(file),), seq_length=32)
    samples = SampleTokenizer(tokenizers[0], seq_length=32)
    reader = RowReader(tokenizers[0], samples, config)
    with ends_well():
        for outcome in inspect_samples(config, samples):
            for row in outcome.rows:
                json.dumps(row_record(reader, row))


@fuzzed(100)
@given(
    st.lists(st.sampled_from(ROWS).flatmap(changed_json), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_whole_data_sets(
    folder: Path, tokenizers: list[Any], rows: list[Any], packing: bool, streaming: bool
) -> None:
    file = folder / "set.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        data=(f"{file}:1.5",),
        seq_length=32,
        packing=packing,
        streaming=streaming,
        cache_dir=str(folder / "cache"),
    )
    with ends_well():
        data = build_dataset(config, tokenizers[0])
        for _, row in zip(range(3), data.train, strict=False):
            assert len(row)


@fuzzed(150)
@given(
    st.sampled_from(ODD_TEXTS) | st.text(max_size=8), st.sampled_from(("", ":0.5", ":nan", ":x"))
)
def test_names_of_sources(folder: Path, name: str, weight: str) -> None:
    with ends_well():
        find_source(f"{folder}/{name}{weight}")


@fuzzed(120)
@given(st.data())
def test_files_of_prompts(folder: Path, data: st.DataObject) -> None:
    rows = [{"prompt": "what is"}, ROWS[0]]
    file = folder / data.draw(st.sampled_from(("prompts.txt", "prompts.jsonl")))
    file.write_bytes(
        data.draw(
            changed_bytes("\n".join(map(json.dumps, rows)).encode())
            | st.sampled_from(rows).flatmap(changed_json_file)
        ).replace(b"\n", b" ")
    )
    with ends_well():
        for messages in read_prompts(file):
            assert all(isinstance(message["content"], str) for message in messages)


PIECES = (
    *("{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ m.nothing.at.all }}", "{{ nothing() }}", "{{ [][1] }}"),
    *("{% for i in range(10**9) %}{{ i }}{% endfor %}", "{{ 'a' * 10**12 }}", "{% if %}", "{{"),
    *("{{ messages.__class__ }}", "{{ raise_exception('no') }}"),
    *("{% include 'secret' %}", "{% import 'os' as os %}", "{{ ''|nofilter }}", "{{ int('a') }}"),
    *(
        "{% generation %}",
        "{% endgeneration %}",
        "{{ m.content|int|list }}",
        "{{ '%d'|format('a') }}",
    ),
    *("{{ messages[9].role }}", "{{ strftime_now('%\\0') }}", "{{ m|tojson(indent='a') }}", ""),
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Return a chat template with some of its text replaced by other statements."""
    text = draw(st.sampled_from([t for t in TEMPLATES if t]))
    start, length = draw(st.integers(0, len(text))), draw(st.integers(0, 12))
    return text[:start] + draw(st.sampled_from(PIECES)) + text[start + length :]


@fuzzed(150)
@given(templates(), st.sampled_from(ROWS[:5]))
def test_chat_templates(folder: Path, tokenizers: list[Any], template: str, row: Any) -> None:
    (folder / "template.jinja").write_text(template)
    (folder / "one.jsonl").write_text(json.dumps(row))
    with ends_well():
        samples = SampleTokenizer(
            tokenizers[0], seq_length=64, template_file=str(folder / "template.jinja")
        )
        for parsed in parse_rows(find_source(str(folder / "one.jsonl"))):
            assert not isinstance(parsed.sample, DataError)
            samples.tokenise(parsed.sample, source=0)
