"""tools/make/split_texts.py keeps what is measured out of what is learnt."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools/make/split_texts.py"


def split(folder: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, "--output", folder, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_whole_documents_are_learnt_or_measured(tmp_path: Path) -> None:
    parted = tmp_path / "parted.txt"
    parted.write_text("\n\n".join(f"Document {n},\nin two lines ." for n in range(10)))
    by_line = tmp_path / "by_line.txt"
    by_line.write_text("\n".join(f"Line {n}." for n in range(10)))
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
    learnt = rows_of(tmp_path / "first/train/parted.jsonl")
    assert {"text": "Document 1,\nin two lines."} in learnt + rows_of(
        tmp_path / "first/heldout/parted.jsonl"
    )
    assert len(rows_of(tmp_path / "first/train/other.jsonl")) == 4
    assert not (tmp_path / "first/heldout/other.jsonl").exists()

    assert split(tmp_path / "second", *flags).returncode == 0
    for path in sorted((tmp_path / "first").rglob("*.jsonl")):
        again = tmp_path / "second" / path.relative_to(tmp_path / "first")
        assert path.read_text() == again.read_text()


def test_what_cannot_be_split_is_named(tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.txt", tmp_path / "broken.jsonl"
    empty.write_text("\n\n")
    broken.write_text('{"text": "a"}\n{"text": ')
    for path, message in ((empty, "no document"), (broken, "line 2")):
        result = split(tmp_path / "out", "--measured", path)
        assert result.returncode != 0
        assert f"{path}" in result.stderr and message in result.stderr
        assert "Traceback" not in result.stderr
    result = split(tmp_path / "out", "--measured", broken, "--held_out", 1)
    assert result.returncode == 2 and "--held_out 1" in result.stderr
