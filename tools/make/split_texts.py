"""Split text into what a comparison learns from and what it is measured on, by whole documents.

    python tools/make/split_texts.py --measured wiki_demo.txt c4_demo.jsonl alpaca_en_demo.json \\
        --other medquad.jsonl state_union.txt --output TEXT

Writes TEXT/train/NAME.jsonl and TEXT/heldout/NAME.jsonl, the folders that
tools/bench/real_model.sh reads. One document in --held_out of each --measured file is kept out of
training; --other files are only learnt from, so that maps and routers do not see the measured
kinds of text alone. The same files give the same split.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_backbone import clean

SEED = 11
Row = dict[str, Any]


def main() -> None:
    """Write both folders and print what went where."""
    args = _parse()
    # All is read first, so that a file that cannot be leaves no half of a split.
    rows_of = {path: list(documents(path)) for path in [*args.measured, *args.other]}
    for path, rows in rows_of.items():
        if not rows:
            raise SystemExit(f"{path}: no document in it")
        random.Random(SEED).shuffle(rows)
    held_out = {path: rows_of[path][:: args.held_out] for path in args.measured}
    # No copy of what is measured is learnt, in whichever file it is.
    measured = {json.dumps(row) for rows in held_out.values() for row in rows}
    for path, rows in rows_of.items():
        learnt = [row for row in rows if json.dumps(row) not in measured]
        kept = {"heldout": held_out.get(path, []), "train": within(learnt, args.characters)}
        for folder, chosen in kept.items():
            if chosen:
                write(args.output / folder / _name_of(path), chosen)


def documents(path: Path) -> Iterator[Row]:
    """Yield the rows of a .json or .jsonl file, or the documents of a .txt file: what blank lines
    part or, in a file without any, its lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: is not UTF-8 ({error}); convert it") from None
    if path.suffix == ".json":
        rows = _parsed(text, f"{path}")
        if not isinstance(rows, list):
            raise SystemExit(f"{path}: expected a list of rows, found {type(rows).__name__}")
        yield from (_row(row, f"{path}, row {n}") for n, row in enumerate(rows, start=1))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _row(_parsed(line, where), where)
    else:
        parts = re.split(r"\n\s*\n", text.strip())
        for part in parts if len(parts) > 1 else text.splitlines():
            if part.strip():
                yield {"text": clean(part.strip())}


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise SystemExit(f"{where}: is not JSON ({error})") from None


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise SystemExit(f"{where}: a row is an object, found {type(value).__name__}")
    return value


def _name_of(path: Path) -> str:
    return f"{path.stem}.jsonl"


def within(rows: list[Row], characters: int) -> list[Row]:
    """Return the first rows, up to about so many characters."""
    chosen, left = [], characters
    for row in rows:
        if left <= 0:
            break
        chosen.append(row)
        left -= sum(len(value) for value in row.values() if isinstance(value, str))
    return chosen


def write(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} documents, {path.stat().st_size / 1e6:.2f} MB")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several: dict[str, Any] = {"type": Path, "nargs": "+", "metavar": "FILE"}
    parser.add_argument(
        "--measured", required=True, help="files to learn from and measure on", **several
    )
    parser.add_argument("--other", default=[], help="files to learn from alone", **several)
    parser.add_argument(
        "--held_out", type=int, default=5, help="measure on one document in so many [5]"
    )
    parser.add_argument(
        "--characters", type=int, default=1_000_000, help="learn from so much of a file [1000000]"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="for both folders"
    )
    args = parser.parse_args()
    written: dict[str, Path] = {}
    for path in [*args.measured, *args.other]:
        if not path.is_file():
            parser.error(f"{path}: no such file")
        other = written.setdefault(_name_of(path), path)
        if other != path:
            parser.error(
                f"{other} and {path} would both be written to {_name_of(path)}; rename one"
            )
    if args.output.is_file() or (args.output.is_dir() and any(args.output.iterdir())):
        parser.error(f"--output {args.output} is there and not empty; name another folder")
    if args.held_out < 2:
        parser.error(f"--held_out {args.held_out} leaves nothing to learn from; give 2 or more")
    return args


if __name__ == "__main__":
    main()
