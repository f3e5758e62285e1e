"""inspect-data shows what training reads, row for row, and goes on where training stops."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from data_samples import CHATML, chat, fast_tokenizer, questions, slow_tokenizer, write_lines

from megaskip.cli.inspect_data import main
from megaskip.config import DataConfig
from megaskip.data import PackedRow, Row, build_dataset
from megaskip.data.dataset import find_sources
from megaskip.data.inspect import (
    MALFORMED,
    NO_FORMAT,
    NOT_TOKENISED,
    UNREADABLE,
    InspectedRow,
    inspect_samples,
)
from megaskip.data.inspect_report import COPY, HELD_OUT, NOT_DRAWN, TRAINED, Inspection
from megaskip.data.row_text import (
    CONTEXT,
    CUT,
    CUT_ANSWER,
    LEARNT,
    PROMPT,
    PROMPT_LEARNT,
    RowReader,
    RowText,
)
from megaskip.data.stats import CUT_AWAY, UNLEARNABLE
from megaskip.data.tokenize import SampleTokenizer
from megaskip.errors import ConfigError, DataError
from megaskip.inspection.file import RowFile, row_record
from megaskip.inspection.summary import source_lines
from megaskip.inspection.view import View, row_lines

PLAIN = View(colour=False)
COLOURED = View(colour=True)
FATES = (TRAINED, HELD_OUT, COPY, NOT_DRAWN)
DEMO_BACKBONE = Path(__file__).parents[2] / "megaskip" / "demo" / "backbone"


def make_config(*data: str, **values: Any) -> DataConfig:
    return DataConfig(data=data, **{"held_out": 0, "seq_length": 64, **values})


def rows_of(config: DataConfig, tokenizer: Any) -> list[InspectedRow]:
    """Return every row in the order in which it is read."""
    samples = inspect_samples(config, sample_tokenizer(config, tokenizer))
    return [row for outcome in samples for row in outcome.rows]


def sample_tokenizer(config: DataConfig, tokenizer: Any) -> SampleTokenizer:
    return SampleTokenizer(
        tokenizer, seq_length=config.seq_length, template_file=config.chat_template
    )


def reader_of(config: DataConfig, tokenizer: Any) -> RowReader:
    return RowReader(tokenizer, sample_tokenizer(config, tokenizer), config)


def text_of(config: DataConfig, tokenizer: Any) -> RowText:
    """Return the only row as text."""
    (row,) = rows_of(config, tokenizer)
    text = reader_of(config, tokenizer).read(row)
    assert text is not None
    return text


def inspection_of(config: DataConfig, tokenizer: Any, rows: int = 5) -> Inspection:
    inspection = Inspection(config, find_sources(config), rows=rows)
    for outcome in inspect_samples(config, sample_tokenizer(config, tokenizer)):
        inspection.add(outcome)
    return inspection


def segments(rows: Iterable[Row | PackedRow]) -> list[tuple[Any, ...]]:
    return sorted(
        (s.input_ids.tolist(), s.supervised.tolist(), s.prompt_length, s.source)
        for row in rows
        for s in row.segments
    )


# -- the same as training


@pytest.mark.parametrize(
    "values",
    [
        {"held_out": 6},
        {"held_out": 6, "packing": True, "tokenize_workers": 2},
        {"held_out": 6, "max_samples": 31, "seed": 3},
        {"eval_data": True, "seq_length": 24},
    ],
)
def test_rows_and_their_use_are_those_of_training(values: dict[str, Any], tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "a.jsonl", [*questions(30), *questions(5)])
    (tmp_path / "b.txt").write_text("hello world how are you today " * 60)
    more = write_lines(tmp_path / "c.jsonl", questions(10, start=50))
    if values.get("eval_data"):
        values = {**values, "eval_data": (write_lines(tmp_path / "e.jsonl", questions(8, 90)),)}
    config = make_config(
        chats, f"{tmp_path}/b.txt:2", f"{more}:0.5", cache_dir=str(tmp_path / "cache"), **values
    )
    data = build_dataset(config, fast_tokenizer())
    inspection = inspection_of(config, fast_tokenizer(), rows=1000)
    fates = inspection.fates()
    assert fates is not None
    rows = [row.row for _, row in inspection.picker.picked()]
    used = {fate: [row for i, row in enumerate(rows) if fates[i] == fate] for fate in FATES}
    twice = [rows[i] for i in fates.plan.train]
    assert segments(filter(None, twice)) == segments(data.train)
    assert segments(filter(None, used[HELD_OUT])) == segments(data.held_out)
    assert {r.source for r in filter(None, used[NOT_DRAWN])} <= {2}
    assert len(used[COPY]) == data.stats.duplicates_of_held_out
    assert fates.num_not_drawn == len(used[NOT_DRAWN])
    assert sum(map(len, used.values())) == len(rows)
    assert tuple(report.stats for report in inspection.reports) == data.stats.sources


def test_packed_neighbours_are_those_of_the_pack(tmp_path: Path) -> None:
    config = make_config(write_lines(tmp_path / "a.jsonl", questions(20)), packing=True)
    fates = inspection_of(config, fast_tokenizer()).fates()
    assert fates is not None and fates.plan.packs is not None
    members = [[int(fates.plan.train[p]) for p in pack] for pack in fates.plan.packs]
    assert all(fates.num_neighbours(row) == len(pack) - 1 for pack in members for row in pack)


def test_shown_rows_are_from_all_over_the_data(tmp_path: Path) -> None:
    config = make_config(write_lines(tmp_path / "a.jsonl", questions(300)))
    shown = [index for index, _ in inspection_of(config, fast_tokenizer(), 20).picker.picked()]
    assert shown == sorted(set(shown)) and len(shown) == 20
    assert shown[0] < 100 and shown[-1] > 200
    other = dataclasses.replace(config, seed=1)
    assert shown != [i for i, _ in inspection_of(other, fast_tokenizer(), 20).picker.picked()]


# -- rows that training stops at or drops

BAD_LINES = [
    json.dumps(chat(("user", "hello"), ("assistant", "fine"))),
    '{"messages": [',
    "[1, 2]",
    '{"messages": [{"role": "narrator", "content": "hello"}]}',
    '{"question": "what", "answer": "four"}',
    '{"messages": [{"role": "user", "content": "hello"}, {"role": "tool", "content": "no"}]}',
    '{"messages": [{"role": "user", "content": "hello"}]}',
    json.dumps(chat(("user", "hello " * 80), ("assistant", "fine"))),
    json.dumps(chat(("user", "how"), ("assistant", "thanks"))),
]
REASONS = ["", UNREADABLE, UNREADABLE, MALFORMED, MALFORMED, NOT_TOKENISED, UNLEARNABLE, CUT_AWAY]
STRICT = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_row_has_its_reason_and_place_and_the_rows_behind_it_are_read(
    workers: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    config = make_config(str(path), tokenize_workers=workers, cache_dir=str(tmp_path / "cache"))
    rows = rows_of(config, fast_tokenizer(STRICT))
    assert [row.reason for row in rows] == [*REASONS, ""]
    assert [row.place for row in rows] == [f"{path}, line {n}" for n in range(1, 10)]
    assert rows[1].message == "cannot be read: column 15: not valid JSON (Expecting value)"
    assert "field 'messages[0].role' is the text \"narrator\"" in rows[3].message
    assert "no tools" in rows[5].message
    with pytest.raises(DataError) as error:
        build_dataset(config, fast_tokenizer(STRICT))
    assert str(error.value) == str(rows[1].error)


def test_unknown_format_is_reported_row_by_row_until_one_fits(tmp_path: Path) -> None:
    rows = [{"promt": "a", "completion": "b"}, *questions(2)]
    config = make_config(write_lines(tmp_path / "a.jsonl", rows))
    inspected = rows_of(config, fast_tokenizer())
    assert [row.reason for row in inspected] == [NO_FORMAT, "", ""]
    assert "did you mean 'prompt' instead of 'promt'" in inspected[0].message


def test_unreadable_file_of_a_folder_does_not_hide_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("not parquet")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.json").write_text("[1,")
    write_lines(tmp_path / "d.jsonl", questions(1))
    rows = rows_of(make_config(str(tmp_path)), fast_tokenizer())
    assert [row.reason for row in rows] == [UNREADABLE] * 3 + [""]
    assert "not UTF-8" in rows[1].message and "not valid JSON" in rows[2].message


def test_summary_counts_reasons_and_names_the_first_row_of_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    config = make_config(str(path))
    inspection = inspection_of(config, fast_tokenizer(STRICT))
    reader = reader_of(config, fast_tokenizer(STRICT))
    # Without spaces: where a line is wrapped depends on how long the folder's name is.
    text = "".join("".join(source_lines(PLAIN, inspection.reports[0], reader)).split())
    wanted = (
        "9 read: 2 used, 7 dropped",
        f"2 dropped: cannot be read first {path}, line 2",
        f"1 dropped: {CUT_AWAY} first {path}, line 8",
    )
    for line in wanted:
        assert "".join(line.split()) in text
    assert inspection.num_errors == 5 and inspection.first_error is not None


# -- columns


def test_columns_that_no_format_reads_are_named_with_their_share(tmp_path: Path) -> None:
    rows = [chat(("user", "hello"), ("assistant", "fine")) for _ in range(4)]
    rows[0]["messages"][1]["loss"] = False
    rows[1]["system"] = "be short"
    rows[2]["messages"][1]["rated"] = True
    for row in rows:
        row |= {"id": 3, "tools": None, "tags": []}
    config = make_config(write_lines(tmp_path / "a.jsonl", rows))
    report = inspection_of(config, fast_tokenizer()).reports[0]
    read = {"messages", "messages[].role", "messages[].content", "messages[].loss", "system"}
    columns = report.stats.columns
    assert set(columns.used) == read
    assert {name: columns.filled[name] for name in columns.ignored} == {
        "messages[].rated": 1,
        "id": 4,
    }
    text = "\n".join(source_lines(PLAIN, report, reader_of(config, fast_tokenizer())))
    ignored = r"columns ignored +id 100%, messages\[\]\.rated 25%; if messages\[\]\.rated says"
    assert re.search(ignored, text)


def test_columns_and_formats_that_are_nearly_right_come_with_advice(tmp_path: Path) -> None:
    rows = [{"question": "what", "answer": "four", "system_message": "be short", "id": 1}]
    config = make_config(write_lines(tmp_path / "a.jsonl", rows))
    advice = inspection_of(config, fast_tokenizer()).reports[0].stats.columns.advice()
    assert advice == "; if system_message is what system is elsewhere, call it that"
    config = make_config(write_lines(tmp_path / "a.jsonl", [{**rows[0], "images": ["a.png"]}]))
    report = inspection_of(config, fast_tokenizer()).reports[0]
    text = "\n".join(source_lines(PLAIN, report, reader_of(config, fast_tokenizer())))
    assert re.search(r"format +question/answer, but no row fits it", text)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", questions(2))
    (tmp_path / "b.csv").write_text("question,answer\n")
    (tmp_path / "c.md").write_text("# Notes")
    write_lines(tmp_path / "test.jsonl", questions(3))
    config = make_config(str(tmp_path))
    report = inspection_of(config, fast_tokenizer()).reports[0]
    text = "\n".join(source_lines(PLAIN, report, reader_of(config, fast_tokenizer())))
    assert "a.jsonl (2 rows), b.csv (0 rows)" in text
    left_out = r"files left out +not a kind of file that is read: c\.md; test split: test\.jsonl"
    assert re.search(left_out, text)


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        (CHATML, ""),
        (CHATML.removeprefix("{{ bos_token }}"), "; the tokenizer puts {<s>} before a text"),
        ("{{ bos_token }}" + CHATML, "; the tokenizer puts {<s>} before a text"),
    ],
)
def test_beginning_that_is_missing_or_doubled_is_told(
    template: str, warning: str, tmp_path: Path
) -> None:
    config = make_config(write_lines(tmp_path / "a.jsonl", questions(3)))
    tokenizer = fast_tokenizer(template)
    report = inspection_of(config, tokenizer).reports[0]
    text = "\n".join(source_lines(PLAIN, report, reader_of(config, tokenizer)))
    assert re.search(rf"rows begin +with \S+ \S+ 100%{re.escape(warning)}\n", text)


# -- text


def test_spans_tell_prompt_answer_and_context_and_lose_no_text(tmp_path: Path) -> None:
    turns = ("user", "hello"), ("assistant", "fine"), ("user", "how"), ("assistant", "thanks")
    config = make_config(write_lines(tmp_path / "a.jsonl", [chat(*turns)]))
    tokenizer = fast_tokenizer()
    text = text_of(config, tokenizer)
    assert [(span.kind, span.text) for span in text.spans] == [
        (PROMPT, "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
        (LEARNT, "fine<|im_end|>"),
        (CONTEXT, "\n<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"),
        (LEARNT, "thanks<|im_end|>"),
    ]
    assert text.answers() == ["fine<|im_end|>", "thanks<|im_end|>"]
    assert "".join(span.text for span in text.spans) == tokenizer.decode(list(text.ids))
    assert text.spans[1].pieces == (("fine", False), ("<|im_end|>", True))
    assert text.spans[0].start == 0 and text.spans[-1].end == len(text.ids) == text.length


def test_slow_tokenizer_keeps_the_spaces_at_the_border_of_spans(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(tmp_path, template=None)
    rows = [{"prompt": "what is two", "completion": " plus two"}]
    text = text_of(make_config(write_lines(tmp_path / "a.jsonl", rows)), tokenizer)
    assert [span.kind for span in text.spans] == [PROMPT, LEARNT]
    assert text.spans[1].text == " plus two</s>"


def test_character_that_a_border_cuts_in_two_is_shown_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\u4f60\u597d" * 30)
    config = make_config(str(path), seq_length=8)
    first = rows_of(config, fast_tokenizer())[0]
    text = reader_of(config, fast_tokenizer()).read(first)
    assert text is not None and text.spans[-1].text.endswith("\ufffd")


def test_plain_text_is_read_by_the_router_and_learnt_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world how are you today " * 20)
    config = make_config(f"{tmp_path}/a.txt", prompt_tokens=10)
    row, *more = rows_of(config, fast_tokenizer())
    text = reader_of(config, fast_tokenizer()).read(row)
    assert text is not None and more
    kinds = [(span.kind, span.start, span.end) for span in text.spans]
    assert kinds == [(PROMPT, 0, 1), (PROMPT_LEARNT, 1, 10), (LEARNT, 10, 64)]
    assert row.place.endswith(f"a.txt, line 1, window 1 of {1 + len(more)}")


def test_cut_row_says_where_and_what_is_lost(tmp_path: Path) -> None:
    answer = "the answer is four " * 30
    path = write_lines(tmp_path / "a.jsonl", [chat(("user", "hello"), ("assistant", answer))])
    config, tokenizer = make_config(path), fast_tokenizer()
    text = text_of(config, tokenizer)
    assert text.length == 64 and text.spans[-1].kind == CUT_ANSWER
    assert text.spans[-1].start == 64 and text.spans[-1].text.endswith("<|im_end|>")
    (row,) = rows_of(config, tokenizer)
    lines = list(row_lines(PLAIN, reader_of(config, tokenizer), row, fate=TRAINED))
    lost = len(text.ids) - 64
    assert f"cut at token 64 of {len(text.ids)}: {lost} are lost, {lost} of them answer" in lines


def test_row_that_loses_its_answer_is_dropped_and_shows_it(tmp_path: Path) -> None:
    row = chat(("user", "hello " * 80), ("assistant", "fine"))
    config = make_config(write_lines(tmp_path / "a.jsonl", [row]))
    text = text_of(config, fast_tokenizer())
    assert [span.kind for span in text.spans] == [CONTEXT, CUT, CUT_ANSWER]
    assert text.spans[-1].text == "fine<|im_end|>"


# -- output


def lines_of(view: View, fields: dict[str, Any], folder: Path) -> str:
    config = make_config(write_lines(folder / "a.jsonl", [fields]))
    (row,) = rows_of(config, fast_tokenizer())
    return "\n".join(row_lines(view, reader_of(config, fast_tokenizer()), row, fate=TRAINED))


def test_border_of_prompt_and_answer_is_unmistakable_without_colours(tmp_path: Path) -> None:
    text = lines_of(PLAIN, chat(("user", "hello "), ("assistant", "fine")), tmp_path)
    assert "\x1b" not in text
    assert re.search(r"prompt +0-\d+ \|\{<s>\}\{<\|im_start\|>\}user\\n\n", text)
    assert re.search(r"\|hello \{<\|im_end\|>\}\\n\n +\|\{<\|im_start\|>\}assistant\\n\|\n", text)
    assert re.search(r"LEARNT +\d+-\d+ \|fine\{<\|im_end\|>\}\|$", text)
    assert re.search(r"token by token: .* '\\n' >\|< 'f' 'i' 'ne'", text)


def test_learnt_text_is_coloured_in_a_terminal(tmp_path: Path) -> None:
    text = lines_of(COLOURED, chat(("user", "hello"), ("assistant", "fine")), tmp_path)
    assert "\x1b[30;42mfine\x1b[0m" in text and "\x1b[1;4;30;42m<|im_end|>\x1b[0m" in text
    assert "{<|im_end|>}" not in text


def test_text_of_the_data_cannot_act_on_the_terminal(tmp_path: Path) -> None:
    text = lines_of(PLAIN, chat(("user", "a\x1b[2Jb\ufeff\r"), ("assistant", "fine")), tmp_path)
    assert r"a\x1b[2Jb\ufeff\r" in text and "\x1b" not in text


def test_long_span_keeps_both_of_its_ends(tmp_path: Path) -> None:
    config = make_config(
        write_lines(tmp_path / "a.jsonl", [{"text": "first " + "hello\n" * 200 + "last"}]),
        seq_length=4096,
    )
    (row,) = rows_of(config, fast_tokenizer())
    lines = list(row_lines(PLAIN, reader_of(config, fast_tokenizer()), row))
    assert len(lines) < 30 and any("first" in line for line in lines)
    assert "last{</s>}|" in lines[-1] and any(re.search(r"\.\.\. \d+ lines", x) for x in lines)


def test_record_of_a_bad_row_holds_the_row_of_the_file(tmp_path: Path) -> None:
    config = make_config(write_lines(tmp_path / "a.jsonl", [{"messages": [], "id": 7}]))
    (row,) = rows_of(config, fast_tokenizer())
    record = row_record(reader_of(config, fast_tokenizer()), row)
    assert json.loads(record["text"]) == {"messages": [], "id": 7}
    assert record["dropped"] and record["reason"].startswith(MALFORMED)


# -- the command


@pytest.fixture(name="model")
def make_model(tmp_path: Path) -> Path:
    """A model folder without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DEMO_BACKBONE.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_command_reads_no_weights_and_writes_every_row(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "a.jsonl", [*questions(40), {"question": "no answer"}])
    output = tmp_path / "rows.jsonl"
    flags = ["--model", str(model), "--data", data, "--held_out", "4", "--seq_length", "64"]
    main([*flags, "--rows", "3", "--output", str(output)])
    text = " ".join(capsys.readouterr().out.split())
    assert "41 read: 40 used, 1 dropped" in text and "36 of 40 rows of tokens" in text
    assert f"training stops at {data}, line 41: does not fit the format: field 'answer'" in text
    assert text.count("trained on: ") + text.count("held out: ") == 3 and "\x1b" not in text
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 41 and records[-1]["dropped"] and not records[0]["dropped"]
    assert records[0]["text"] == records[0]["prompt"] + "".join(records[0]["learnt"])
    assert records[0]["learnt"] == [" the answer is 0</s>"]
    assert [record["used_as"] for record in records].count(HELD_OUT) == 4


def test_vocabulary_that_does_not_fit_the_model_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 16}))
    data = write_lines(tmp_path / "a.jsonl", questions(3))
    main(["--model", str(model), "--data", data, "--rows", "0"])
    text = " ".join(capsys.readouterr().out.split())
    assert "training refuses the data: --data: token" in text and "vocabulary of 16" in text


def test_output_does_not_overwrite_the_data(model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", questions(3))
    with pytest.raises(ConfigError, match="is a file of the data"):
        main(["--model", str(model), "--data", data, "--output", data])
    assert len(Path(data).read_text().splitlines()) == 3


def test_a_file_that_was_there_stays_until_all_rows_are_read(model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [*questions(3), {"question": "what"}])
    output = tmp_path / "rows.jsonl"
    output.write_text("earlier")
    reader: Any = None  # is asked for rows, of which there are none
    with pytest.raises(KeyboardInterrupt), RowFile(output, reader, keep=[]):
        raise KeyboardInterrupt
    assert output.read_text() == "earlier"
    main(["--model", str(model), "--data", data, "--output", str(output)])
    assert len(output.read_text().splitlines()) == 4
    assert not list(tmp_path.glob(".*"))


def test_half_characters_reach_the_file_as_escapes(model: Path, tmp_path: Path) -> None:
    rows = [{"question": "what \ud83d", "answer": "four"}, *questions(1)]
    data, output = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "rows.jsonl"
    main(["--model", str(model), "--data", data, "--rows", "1", "--output", str(output)])
    record = json.loads(output.read_text().splitlines()[0])
    assert record["dropped"] and json.loads(record["text"]) == rows[0]


def test_stream_is_read_up_to_a_limit_and_plans_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "a.jsonl", questions(50))
    main(["--model", str(model), "--data", data, "--streaming", "--max_samples", "20"])
    text = capsys.readouterr().out
    assert "20 read: 20 used" in text and "held out" not in text
