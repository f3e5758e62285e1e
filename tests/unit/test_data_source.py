"""Files of every kind give rows with their place, and a bad entry says what to change."""

import json
from pathlib import Path

import datasets
import pytest
from data_samples import write_lines

from megaskip.data.corpus import read_samples
from megaskip.data.source import TEXT_PIECE, find_source, read_rows
from megaskip.errors import DataError

ROWS = [{"text": "one"}, {"text": "two"}]


def texts(entry: Path | str) -> list[str]:
    return [fields["text"] for _, fields in read_rows(find_source(str(entry)))]


def test_json_lines_skip_empty_lines_and_keep_line_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n\n{"text": "two"}\n')
    rows = list(read_rows(find_source(str(tmp_path / "a.jsonl"))))
    assert [(str(place), row) for place, row in rows] == [
        (f"{tmp_path}/a.jsonl, line 1", ROWS[0]),
        (f"{tmp_path}/a.jsonl, line 3", ROWS[1]),
    ]


def test_json_may_be_an_array_or_lines(tmp_path: Path) -> None:
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=2))
    write_lines(tmp_path / "lines.json", ROWS)
    assert texts(tmp_path / "array.json") == texts(tmp_path / "lines.json") == ["one", "two"]
    place, _ = list(read_rows(find_source(str(tmp_path / "array.json"))))[1]
    assert str(place) == f"{tmp_path}/array.json, row 2"


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert texts(tmp_path / "a.parquet") == ["one", "two"]


def test_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "notes.md").write_text("not data")
    assert texts(tmp_path) == ["a", "b"]


def test_text_file_is_cut_at_empty_lines_and_loses_nothing(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i}\n\n" for i in range(TEXT_PIECE // 6))
    (tmp_path / "a.txt").write_text(text)
    pieces = texts(tmp_path / "a.txt")
    assert len(pieces) > 2 and "".join(pieces) == text
    assert all(piece.endswith("\n\n") and len(piece) <= TEXT_PIECE for piece in pieces)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": oops}\n', "line 2, column 10: not valid JSON (Expecting value)"),
        ('{"text": "a"}\n[1]\n', "line 2: expected an object {...}, found [1]"),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2: field 'text' is missing; found 'txt'"),
        ('{"text": "a"}\n{"text": 5}\n', "line 2: field 'text' is the number 5; expected text"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        list(read_samples(find_source(str(tmp_path / "file.jsonl"))))
    assert str(error.value) == f"{tmp_path}/file.jsonl, {message}"


def test_bad_json_array_names_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n {"text" "b"}\n]')
    with pytest.raises(DataError, match=r"a\.json, line 3, column 10: not valid JSON"):
        list(read_rows(find_source(str(tmp_path / "a.json"))))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not UTF-8 text"):
        list(read_rows(find_source(str(tmp_path / "a.jsonl"))))


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        list(read_rows(find_source(str(tmp_path / "a.parquet"))))


@pytest.mark.parametrize(
    ("entry", "weight"),
    [("a.jsonl", 1), ("a.jsonl:2.5", 2.5), ("a.jsonl:.3", 0.3), ("a.jsonl:1e-1", 0.1)],
)
def test_tail_is_a_weight_when_it_is_a_number(tmp_path: Path, entry: str, weight: float) -> None:
    write_lines(tmp_path / "a.jsonl", ROWS)
    source = find_source(str(tmp_path / entry))
    assert (source.weight, source.name) == (weight, str(tmp_path / "a.jsonl"))


def test_colon_in_a_file_name_is_not_a_weight(tmp_path: Path) -> None:
    write_lines(tmp_path / "a:b.jsonl", ROWS)
    (tmp_path / "run:3").mkdir()
    write_lines(tmp_path / "run:3" / "a.jsonl", ROWS)
    assert find_source(str(tmp_path / "a:b.jsonl")).weight == 1
    assert find_source(str(tmp_path / "run:3")).weight == 1


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weight_must_be_above_zero(tmp_path: Path, weight: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=f"the weight {weight} must be a number above 0"):
        find_source(f"{path}:{weight}")


def test_missing_file_suggests_a_near_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "alpaca.jsonl", ROWS)
    with pytest.raises(DataError, match=f"no such file or folder; did you mean '{path}'"):
        find_source(str(tmp_path / "alpacca.jsonl"))


def test_missing_file_lists_the_folder_when_nothing_is_near(tmp_path: Path) -> None:
    write_lines(tmp_path / "alpaca.jsonl", ROWS)
    with pytest.raises(DataError, match=r"which holds alpaca\.jsonl"):
        find_source(str(tmp_path / "zzz.parquet"))
    with pytest.raises(DataError, match=r"the folder .*/no does not exist"):
        find_source(str(tmp_path / "no" / "a.jsonl"))


def test_unknown_suffix_and_empty_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'; expected one of \.json"):
        find_source(str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="the folder holds no file that ends in"):
        find_source(str(tmp_path))


def test_hub_names_are_told_from_missing_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source("org/name").files == ()
    assert find_source("org/name/subset:2").weight == 2
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        find_source("data/alpaca")


def test_unreachable_hub_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"did not give its train split \(no network\). Check"):
        list(read_rows(find_source("org/name")))
