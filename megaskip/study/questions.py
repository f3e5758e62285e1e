"""Questions with options of which one is right: minimal pairs and multiple choice, as batches.

Knows files and tokens, not models. An option's score is its log-likelihood behind the question's
context, as in lm-eval; a minimal pair is a question of two options without a context.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaskip.data.collate import collate
from megaskip.data.request_encoder import RequestEncoder
from megaskip.data.row import Row
from megaskip.data.vocabulary import padding_token, require_known_token
from megaskip.errors import DataError

PAIRS = "blimp"
"""Name of the task that the sets of minimal pairs make."""
PROMPTS = {"arc_easy": "{query}\nAnswer:", "arc_challenge": "{query}\nAnswer:"}
PROMPTS["boolq"] = "{query}\nAnswer:"
"""What asks for an answer, by the file's name; other files' queries are continued as they are. The
local_* tasks of `megaskip evaluate` ask alike."""
_ROWS, _TOKENS = 64, 4096
"""Most of a batch; tokens with padding. Each has logits over the whole vocabulary."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked once; one document of a comparison."""

    context: str
    options: tuple[str, ...]
    """What may stand behind the context, with the space between."""
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """One value a question: 1 where the right option has the highest score, alone."""

    right: Numbers
    """By log-likelihood: lm-eval's acc."""
    right_norm: Numbers
    """By log-likelihood over characters of the option: lm-eval's acc_norm."""


class QuestionSet:
    """The questions of a task as batches: a row is an option behind its context, and all options of
    a question are one document."""

    def __init__(
        self,
        name: str,
        questions: Sequence[Question],
        tokenizer: Any,
        *,
        prompt_tokens: int,
        vocabulary: int,
        max_length: int,
    ) -> None:
        """`vocabulary` is the rows of the model's embedding, `max_length` the longest row; a longer
        context loses its beginning. Raises DataError for a token beyond the vocabulary."""
        self.name, self.questions = name, questions
        encoder = RequestEncoder(tokenizer, max_length)
        asked = [(n, q.context, option) for n, q in enumerate(questions) for option in q.options]
        rows = [_row(encoder, query, option, vocabulary, max_length) for _, query, option in asked]
        # Rows of like length share a batch; options keep the order of their question.
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].input_ids))
        pad = padding_token(tokenizer, vocabulary)
        self.batches = [
            collate([rows[row] for row in chunk], pad_token_id=pad, prompt_tokens=prompt_tokens)
            for chunk in _chunks(order, [len(row.input_ids) for row in rows])
        ]
        self.documents = [asked[row][0] for row in order]
        """The question of each row of the batches."""
        self._order = np.array(order)
        self._borders = np.cumsum([len(question.options) for question in questions])[:-1]
        characters = [len(option.removeprefix(" ")) for _, _, option in asked]
        self._characters = np.array(characters, dtype=np.float64)

    def judge(self, nll: Numbers) -> Answers:
        """Return which questions are answered right; `nll` is by row of the batches, nats."""
        by_option = np.empty_like(nll)
        by_option[self._order] = nll
        return Answers(
            right=self._right(-by_option), right_norm=self._right(-by_option / self._characters)
        )

    def _right(self, scores: Numbers) -> Numbers:
        of_questions = zip(self.questions, np.split(scores, self._borders), strict=True)
        return np.array(
            [
                float((own[question.gold] > np.delete(own, question.gold)).all())
                for question, own in of_questions
            ]
        )


def read_pairs(folder: Path, limit: int) -> list[Question]:
    """Return the minimal pairs of a folder of JSONL files, `limit` of each, the good sentence
    first.

    Raises DataError for a folder without such files or pairs, and for a line that is no pair.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DataError(f"{folder}: no .jsonl file with minimal pairs there")
    pairs = [_pair(row, where) for file in files for row, where in _rows_of(file, limit)]
    if not pairs:
        raise DataError(f"--blimp {folder}: its .jsonl files have no rows")
    return pairs


def read_choices(paths: Sequence[Path], limit: int) -> dict[str, list[Question]]:
    """Return {task: questions} of JSONL files and of all in folders, `limit` of each from all over
    it; a task is called as its file.

    Raises DataError for a path without such files, for two of one name, and for a line that is no
    question.
    """
    tasks: dict[str, list[Question]] = {}
    for path in paths:
        files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"--choice {path}: no .jsonl file with questions there")
        for file in files:
            if file.stem in tasks:
                raise DataError(f"--choice {file}: a second file of this name; rename one")
            prompt = PROMPTS.get(file.stem, "{query}")
            questions = [_question(row, where, prompt) for row, where in _rows_of(file)]
            if not questions:
                raise DataError(f"--choice {file} has no rows")
            count = min(limit, len(questions))
            chosen = [questions[index * len(questions) // count] for index in range(count)]
            tasks[file.stem] = chosen
    return tasks


# -- rows


def _row(
    encoder: RequestEncoder, context: str, option: str, vocabulary: int, max_length: int
) -> Row:
    before, after = encoder.pair(context, option, is_chat=False)
    if not after:
        raise DataError(f"the tokenizer makes no token of the option {option!r}")
    if len(before) + len(after) > max_length:
        before = encoder.cut(before, max(max_length - len(after), 1))
    ids = [*before, *after]
    require_known_token(max(ids), vocabulary, text=repr(option[:40]))
    return Row(
        input_ids=np.asarray(ids, dtype=np.int32),
        supervised=np.arange(len(ids)) >= len(before),
        # Without a context there is no prompt: decisions read the first tokens, as of plain text.
        prompt_length=len(before) if context else 0,
        source=0,
    )


def _chunks(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield rows in `order`, which is by length, in batches that are not too large."""
    chunk: list[int] = []
    for row in order:
        if chunk and (len(chunk) == _ROWS or (len(chunk) + 1) * lengths[row] > _TOKENS):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


# -- files


def _rows_of(path: Path, limit: int | None = None) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield (row, where it stands) of a file's first `limit` lines that hold something."""
    taken = 0
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if taken == limit:
                return
            if line.strip():
                taken += 1
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}: not valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: expected an object, found {type(row).__name__}")
                yield row, where


def _pair(row: Mapping[str, Any], where: str) -> Question:
    good, bad = row.get("sentence_good"), row.get("sentence_bad")
    if not (_is_text(good) and _is_text(bad)):
        raise DataError(f"{where}: expected texts as sentence_good and sentence_bad")
    return Question(context="", options=(str(good), str(bad)), gold=0)


def _question(row: Mapping[str, Any], where: str, prompt: str) -> Question:
    query, choices, gold = row.get("query"), row.get("choices"), row.get("gold")
    if not _is_text(query):
        raise DataError(f"{where}: query is {query!r}, expected a text")
    if not (isinstance(choices, list) and len(choices) > 1 and all(map(_is_text, choices))):
        raise DataError(f"{where}: choices is {choices!r}, expected a list of two texts or more")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise DataError(
            f"{where}: gold is {gold!r}, expected the number of a choice, 0 to {len(choices) - 1}"
        )
    options = tuple(f" {choice}" for choice in choices)
    return Question(context=prompt.format(query=query), options=options, gold=gold)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
