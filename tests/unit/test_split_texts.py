"""tools/make/split_texts.py keeps what is measured out of what is learnt."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools/make/split_texts.py"


def split(folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, "--output", folder, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_whole_documents_are_learnt_or_measured(tmp_path: Path) -> None:
    parted = tmp_path / "parted.txt"
    parted.write_text("\n\n".join(f"Document {n},\nin two lines ." for n in range(10)))
    by_line = tmp_path / "by_line.txt"
    by_line.write_text("\n".join(f"Line {n}." for n in range(10)))
    copied = tmp_path / "copied.txt"
    copied.write_text(by_line.read_text())
    chats = tmp_path / "chats.json"
    # One row twice: were its copies parted, what is learnt would be measured.
    questions = [{"question": f"{n}?", "answer": "No."} for n in range(9)]
    chats.write_text(json.dumps([*questions, questions[0]]))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": 50 * "a"}) + "\n" for _ in range(10)))

    flags = ("--measured", parted, by_line, chats, "--other", other, "--characters", 200)
    result = split(tmp_path / "first", *flags)
    assert result.returncode == 0, result.stderr
    for name in ("parted", "by_line", "chats"):
        learnt = rows_of(tmp_path / f"first/train/{name}.jsonl")
        measured = rows_of(tmp_path / f"first/heldout/{name}.jsonl")
        assert len(measured) == 2
        assert not [row for row in measured if row in learnt]
    folders = (tmp_path / "first/train", tmp_path / "first/heldout")
    parts = [row for folder in folders for row in rows_of(folder / "parted.jsonl")]
    assert {"text": "Document 1,\nin two lines."} in parts
    assert len(rows_of(tmp_path / "first/train/other.jsonl")) == 4
    assert not (tmp_path / "first/heldout/other.jsonl").exists()
    result = split(tmp_path / "copies", "--measured", by_line, "--other", copied)
    assert result.returncode == 0, result.stderr
    measured = rows_of(tmp_path / "copies/heldout/by_line.jsonl")
    assert len(measured) == 2
    copies = rows_of(tmp_path / "copies/train/copied.jsonl")
    assert len(copies) == 8 and not [row for row in measured if row in copies]

    assert split(tmp_path / "second", *flags).returncode == 0
    for path in sorted((tmp_path / "first").rglob("*.jsonl")):
        again = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_text() == again.read_text()


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    texts = ["one\u2028line", "two\x85", "three", "four", "five"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    source.write_text("\n".join([*lines, "", " \n"]), encoding="utf-8")
    result = split(tmp_path / "out", "--measured", source)
    assert result.returncode == 0, result.stderr
    rows = [row for path in (tmp_path / "out").rglob("*.jsonl") for row in rows_of(path)]
    assert sorted(row["text"] for row in rows) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n\n", "no document"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: is not JSON"),
        ("texts.jsonl", b'{"text": "a"}\n"b"', "line 2: a row is an object, found str"),
        ("object.json", b'{"text": "a"}', "expected a list of rows, found dict"),
        ("latin.txt", b"caf\xe9", "is not UTF-8"),
    ],
)
def test_what_cannot_be_split_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    result = split(tmp_path / "out", "--measured", path)
    assert result.returncode != 0
    assert f"{path}" in result.stderr and message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Rows of an earlier split might be measured in this one."""
    first, second = tmp_path / "text.txt", tmp_path / "other/text.txt"
    second.parent.mkdir()
    for path in (first, second):
        path.write_text("a\n\nb\n\nc")
    result = split(tmp_path / "out", "--measured", first, "--other", second)
    assert result.returncode == 2 and "would both be written to text.jsonl" in result.stderr
    assert split(tmp_path / "out", "--measured", first).returncode == 0
    result = split(tmp_path / "out", "--measured", first)
    assert result.returncode == 2 and "is there and not empty" in result.stderr
    result = split(tmp_path / "new", "--measured", first, "--held_out", 1)
    assert result.returncode == 2 and "--held_out 1" in result.stderr
