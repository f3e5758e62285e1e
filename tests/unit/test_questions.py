"""Minimal pairs and multiple choice are scored alike: each option by its log-likelihood."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from data_samples import fast_tokenizer
from families import tiny_model

from megaskip import RouterConfig, attach_routers
from megaskip.data.request_encoder import RequestEncoder
from megaskip.errors import DataError
from megaskip.study.baselines import random_order, skipping
from megaskip.study.questions import PROMPTS, Question, QuestionSet, read_choices, read_pairs
from megaskip.study.scoring import score

TASKS = Path(__file__).parents[2] / "megaskip" / "evaluation" / "tasks"
QUESTIONS = [
    Question(context="what does a cat say", options=(" meow", " woof and moo"), gold=1),
    Question(context="two", options=(" three four", " a", " bc def ghi"), gold=0),
    Question(context="", options=("the dog runs home", "the dog run"), gold=0),
    Question(context="the same", options=(" x", " x"), gold=0),
]


def asked(questions: list[Question], vocabulary: int = 340, longest: int = 64) -> QuestionSet:
    return QuestionSet(
        "task",
        questions,
        fast_tokenizer(),
        prompt_tokens=4,
        vocabulary=vocabulary,
        max_length=longest,
    )


def test_options_are_scored_as_each_alone_and_the_likeliest_wins() -> None:
    model, task = tiny_model(vocab_size=340), asked(QUESTIONS)
    routers = attach_routers(model, RouterConfig(layers="1-3"))
    answers = task.judge(score(model, routers, task.batches, documents=task.documents).nll)
    encoder, routers_are_off = RequestEncoder(fast_tokenizer(), 64), routers.disabled()
    with routers_are_off, torch.no_grad():
        for number, question in enumerate(QUESTIONS[:3]):
            sums = []
            for option in question.options:
                before, after = encoder.pair(question.context, option, is_chat=False)
                routers.set_batch(torch.ones(1, len(before + after), dtype=torch.bool))
                logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
                sums.append(sum(float(logits[len(before) + i - 1, t]) for i, t in enumerate(after)))
            normed = [s / len(o.strip()) for s, o in zip(sums, question.options, strict=True)]
            assert answers.right[number] == (np.argmax(sums) == question.gold)
            assert answers.right_norm[number] == (np.argmax(normed) == question.gold)
    assert answers.right[3] == answers.right_norm[3] == 0  # equal options are no answer


def test_all_options_of_a_question_are_skipped_alike() -> None:
    model, task = tiny_model(vocab_size=340), asked(QUESTIONS * 3)
    routers = attach_routers(model, RouterConfig(layers="1-4"))
    policy = skipping(random_order((1, 2, 3, 4), 1), (1, 2, 3, 4), 2.0)
    scores = score(model, routers, task.batches, policy, documents=task.documents)
    by_question: dict[int, set[tuple[float, ...]]] = {}
    for row, question in enumerate(task.documents):
        by_question.setdefault(question, set()).add(tuple(scores.kept[:, row]))
    assert len(by_question) == 12
    assert all(len(ways) == 1 for ways in by_question.values())
    assert len(set.union(*by_question.values())) > 2


def test_rows_are_begun_cut_and_checked_as_texts_are() -> None:
    tokenizer = fast_tokenizer(bos=False)
    assert all(
        int(batch.input_ids[0, 0]) == tokenizer.bos_token_id
        for batch in asked([QUESTIONS[2]]).batches
    )
    (long,) = asked(
        [Question(context="word " * 99, options=(" a", " b"), gold=0)], longest=16
    ).batches
    assert long.input_ids.shape == (2, 16)
    assert long.counts.supervised == int((long.labels != -100).sum()) >= 2
    with pytest.raises(DataError, match="token .* is beyond the model's vocabulary of 5"):
        asked(QUESTIONS, vocabulary=5)


def test_files_are_read_as_lm_eval_asks_them(tmp_path: Path) -> None:
    rows = [{"query": f"q{i} {{}}", "choices": ["a", "b"], "gold": i % 2} for i in range(10)]
    for name in ("arc_easy", "copa"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = read_choices([tmp_path], 5)
    assert [q.context for q in tasks["copa"]] == [f"q{i} {{}}" for i in (0, 2, 4, 6, 8)]
    assert tasks["arc_easy"][1] == Question(context="q2 {}\nAnswer:", options=(" a", " b"), gold=0)
    with pytest.raises(DataError, match="a second file of this name"):
        read_choices([tmp_path, tmp_path / "copa.jsonl"], 5)
    for file in TASKS.glob("local_*.yaml"):
        text = file.read_text().replace("!function ", "")
        content = yaml.safe_load(text)
        stem = Path(content["dataset_kwargs"]["files"]).stem
        if "gold" in content["dataset_kwargs"]["fields"]:
            expected = PROMPTS.get(stem, "{query}").replace("{query}", "{{query}}")
            assert content["doc_to_text"] == expected, file.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, found list"),
        ('{"query": " ", "choices": ["a", "b"], "gold": 0}', "query is ' ', expected a text"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "expected a list of two texts or more"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2, .* 0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold is True"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "set.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_choices([tmp_path / "set.jsonl"], 5)


def test_a_line_that_is_no_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"sentence_good": "a b"}\n')
    with pytest.raises(DataError, match=r"set.jsonl, line 1: expected .* sentence_bad"):
        read_pairs(tmp_path, 5)
    (tmp_path / "set.jsonl").write_text('\n{"sentence_good": "a b", "sentence_bad": "c"}\n\n')
    assert read_pairs(tmp_path, 5) == [Question(context="", options=("a b", "c"), gold=0)]
    for read in (
        lambda: read_pairs(tmp_path / "none", 5),
        lambda: read_choices([tmp_path / "x"], 5),
    ):
        with pytest.raises(DataError, match="no .jsonl file"):
            read()
