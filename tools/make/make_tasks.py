"""Make the data of the bundled evaluation tasks: held-out prompts and texts. Knows no model.

    python tools/make/make_tasks.py

writes megaskip/evaluation/tasks/demo_*.jsonl. Prompts are of the fifth that the backbone never saw,
with another seed than the instruction set's, and none of them is in it.
"""

import argparse
import json
from pathlib import Path
from random import Random
from typing import Any

import demo_tasks
import make_demo

TASKS = make_demo.ROOT / "megaskip" / "evaluation" / "tasks"
SEED = 2007
CHOICE_ROWS, ANSWER_ROWS, TEXT_ROWS = 240, 240, 48
CHOICES = 4
CHOICE_TASKS = ("count", "next", "owner", "pick", "plural", "retrieve", "reverse", "sort")
"""Tasks with wrong answers that look like right ones."""
ANSWER_TASKS = ("add", "copy", "count", "next", "owner", "pick", "retrieve", "reverse", "sort")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TASKS, help="folder [the package's own]")
    output: Path = parser.parse_args().output
    taken = _instruction_prompts()
    output.mkdir(parents=True, exist_ok=True)
    write(output / "demo_choice.jsonl", choice_rows(Random(SEED), taken))
    write(output / "demo_answers.jsonl", answer_rows(Random(SEED + 1), taken))
    write(output / "demo_text.jsonl", text_rows(Random(SEED + 2)))


def choice_rows(rng: Random, taken: set[str]) -> list[dict[str, Any]]:
    """Return rows {prompt, choices, gold, task}; wrong choices are answers of the same task."""
    rows = []
    for task, prompt, answer in _prompts(rng, CHOICE_TASKS, CHOICE_ROWS, taken):
        choices = _wrong(rng, task, prompt, answer) + [answer]
        rng.shuffle(choices)
        spaced = [f" {choice}" for choice in choices]
        gold = choices.index(answer)
        rows.append({"prompt": prompt, "choices": spaced, "gold": gold, "task": task})
    return rows


def answer_rows(rng: Random, taken: set[str]) -> list[dict[str, Any]]:
    """Return rows {prompt, answer, task}."""
    found = _prompts(rng, ANSWER_TASKS, ANSWER_ROWS, taken)
    return [{"prompt": prompt, "answer": answer, "task": task} for task, prompt, answer in found]


def text_rows(rng: Random) -> list[dict[str, Any]]:
    """Return held-out documents {text}."""
    _, held_out = make_demo.split_text()
    return [{"text": text} for text in rng.sample(held_out, TEXT_ROWS)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines and say how much that is."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size / 1024:.0f} KiB")


def _prompts(
    rng: Random, names: tuple[str, ...], count: int, taken: set[str]
) -> list[tuple[str, str, str]]:
    """Return (task, prompt, answer) of `count` distinct prompts, the tasks in turn."""
    found: dict[str, tuple[str, str, str]] = {}
    while len(found) < count:
        task = names[len(found) % len(names)]
        row = demo_tasks.make_row(rng, task, held_out=True)
        prompt, answer = (turn["content"] for turn in row["messages"])
        if prompt not in taken:
            found.setdefault(prompt, (task, prompt, answer))
    return list(found.values())


def _wrong(rng: Random, task: str, prompt: str, answer: str) -> list[str]:
    """Return wrong answers to a prompt: of the right kind, and of words that it holds if it can
    be."""
    words, wrong, tries = answer.split(), set(), 0
    while len(wrong) < CHOICES - 1:
        tries += 1
        other = demo_tasks.TASKS[task](rng)[1]
        if task in ("reverse", "sort") and len(words) > 2:
            other = " ".join(rng.sample(words, len(words)))
        is_alike = len(other.split()) == len(words) and other.isdigit() == answer.isdigit()
        is_there = other.split()[-1] in prompt
        if other != answer and is_alike and (is_there or tries > 200):
            wrong.add(other)
    return sorted(wrong)


def _instruction_prompts() -> set[str]:
    lines = (make_demo.DEMO / "instruct.jsonl").read_text(encoding="utf-8").splitlines()
    return {demo_tasks.prompt_of(json.loads(line)) for line in lines}


if __name__ == "__main__":
    main()
