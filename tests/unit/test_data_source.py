"""Files of every kind give rows with their place, and a bad entry says what to change."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from data_samples import read_rows, write_lines

from megaskip.data.columns import ColumnCounts
from megaskip.data.corpus import read_samples
from megaskip.data.readers import TEXT_PIECE, number_rows
from megaskip.data.source import find_source
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


def questions_of(entry: Path | str) -> list[tuple[str, str]]:
    rows = [fields for _, fields in read_rows(find_source(str(entry)))]
    return [(row["question"], row["answer"]) for row in rows]


TABLE = [{"question": 'say "a",\nor b', "answer": "NA"}, {"question": "2", "answer": "007"}]
LINES = "".join(json.dumps(row) + "\n" for row in TABLE).encode()


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return file.getvalue().encode()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES),
        ("a.JSON", json.dumps(TABLE).encode()),
        ("a.csv", table(",")),
        ("a.tsv", b"\xef\xbb\xbf" + table("\t")),
    ],
)
def test_rows_are_the_same_in_every_kind_of_file_compressed_or_not(
    tmp_path: Path, name: str, content: bytes, compression: str
) -> None:
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSIONS[compression](content))
    assert questions_of(path) == [(row["question"], row["answer"]) for row in TABLE]


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_file_is_named(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.jsonl{compression}"
    content = b"".join(json.dumps({"text": str(i) * 9}).encode() + b"\n" for i in range(99))
    path.write_bytes(COMPRESSIONS[compression](content)[:-8])
    with pytest.raises(DataError, match=rf"a\.jsonl{compression}: (the compressed|cannot be read)"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,b\none,2\none,two,3\n", r"line 3: 3 cells, but 2 columns in the first line"),
        ("text,b\none\n", r"line 2: 1 cells, but 2 columns"),
        ('text,b\n"one" more,2\n', r"line 2: not a row of a table .* in quotes"),
        ("text,text\none,2\n", r"line 1: two columns have the same name: \['text', 'text'\]"),
    ],
)
def test_bad_table_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.csv")


@pytest.mark.parametrize("indent", [None, 1])
def test_json_object_that_holds_one_list_of_rows_gives_them_all_that_stands_beside_it(
    tmp_path: Path, indent: int | None
) -> None:
    value = {"version": "1", "data": [*TABLE, {**TABLE[0], "version": "2"}]}
    (tmp_path / "a.json").write_text(json.dumps(value, indent=indent))
    rows = [row for _, row in read_rows(find_source(str(tmp_path / "a.json")))]
    assert rows == [{**TABLE[0], "version": "1"}, {**TABLE[1], "version": "1"}, value["data"][2]]


def test_json_object_with_several_lists_is_refused_and_one_row_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": TABLE, "test": TABLE}, indent=1))
    with pytest.raises(DataError, match=r"lists of rows under 'train' and 'test'; expected one"):
        texts(tmp_path / "a.json")
    row = {"messages": [{"role": "user", "content": "Q"}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert [fields for _, fields in read_rows(find_source(str(tmp_path / "a.json")))] == [row]
    (tmp_path / "a.json").write_text('{\n "data": [\n  {"text": oops}\n ]\n}')
    with pytest.raises(DataError, match=r"a\.json, line 3, column 12: not valid JSON"):
        texts(tmp_path / "a.json")


def test_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "a.parquet").write_text(pointer)
    with pytest.raises(DataError, match=r"a\.parquet: a Git LFS pointer.* Run git lfs pull"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["run [a1]", "x*y?", "a{b,c}", "[!a]"])
def test_characters_of_patterns_in_a_path_that_exists_are_literal(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(folder / "saved"))
    data.to_parquet(str(folder / "t[1].parquet"))
    write_lines(folder / "u[1].jsonl", ROWS)
    for path in ("saved", "t[1].parquet", "u[1].jsonl", f"saved/{arrow_file(folder / 'saved')}"):
        assert texts(folder / path) == ["one", "two"]
    assert texts(folder) == ["one", "two"] * 3


def arrow_file(folder: Path) -> str:
    return next(path.name for path in folder.iterdir() if path.suffix == ".arrow")


def test_media_in_columns_are_not_opened(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "pic": datasets.Image()})
    rows = {"text": ["a"], "pic": [{"bytes": b"no picture", "path": "a.png"}]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"row 1: field 'pic' is the object .* no media"):
        list(read_samples(find_source(str(tmp_path / "a.parquet")), ColumnCounts()))


def test_rows_of_unknown_features_are_read() -> None:
    rows = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    assert rows.features is None
    assert [row for _, row in number_rows(rows, "hub")] == [{"text": "a"}]


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


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_of_other_systems_are_the_same_text(tmp_path: Path, end: str) -> None:
    text = "".join(f"paragraph {i}\n\n" for i in range(TEXT_PIECE // 6))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_bytes(text.replace("\n", end).encode())
    assert texts(tmp_path / "b.txt") == texts(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": oops}\n', "line 2, column 10: not valid JSON (Expecting value)"),
        ('{"text": "a"}\n[1]\n', "line 2: expected an object {...}, found [1]"),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2: field 'text' is missing; found 'txt'"),
        ('{"text": "a"}\n{"text": 5}\n', "line 2: field 'text' is the number 5; expected text"),
        (
            '{"text": "a"}\n{"text": "a", "text": "b"}\n',
            "line 2, column 1: not valid JSON (the key 'text' is twice in an object)",
        ),
        (
            '{"text": "a", "ID": 1, "id": 1}\n{"text": "a", "Text": "b"}\n',
            "line 2: fields text and Text are the same but for their case; expected one of them. "
            "Rename or remove the others",
        ),
    ],
)
def test_bad_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.jsonl").write_text(content)
    with pytest.raises(DataError) as error:
        list(read_samples(find_source(str(tmp_path / "file.jsonl")), ColumnCounts()))
    assert str(error.value) == f"{tmp_path}/file.jsonl, {message}"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("value", ["[" * 100_000, "[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_json_beyond_the_limits_of_the_reader_is_one_message(
    tmp_path: Path, name: str, value: str
) -> None:
    (tmp_path / name).write_text(f'{{"text": {value}}}\n{{"text": "b"}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl?, line 1(, column \d+)?: (not valid )?JSON"):
        texts(tmp_path / name)


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


@pytest.mark.parametrize("entry", ["", " ", ":2"])
def test_nothing_is_not_the_present_folder(entry: str) -> None:
    with pytest.raises(DataError, match="names no file, folder or data set"):
        find_source(entry)


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
    (tmp_path / "a.zip").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of file '\.zip'; expected one of \.json"):
        find_source(str(tmp_path / "a.zip"))
    with pytest.raises(DataError, match=r"nothing to train on \(not a kind .* read: a\.zip\)"):
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


@pytest.mark.parametrize(
    ("splits", "read", "streaming"),
    [
        (["train", "validation", "test"], "validation", False),
        (["train", "test"], "test", True),
        (["train"], "train", False),
    ],
)
def test_held_out_data_of_the_hub_are_a_held_out_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: list[str], read: str, streaming: bool
) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split in splits:
        write_lines(folder / f"{split}.jsonl", [{"text": split}])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = find_source("org/name", held_out=True, streaming=streaming)
    monkeypatch.chdir(tmp_path)  # the library takes a folder for a data set of the hub
    assert [(str(place), row["text"]) for place, row in read_rows(source)] == [
        (f"org/name ({read} split), row 1", read)
    ]
