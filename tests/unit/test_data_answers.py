"""Templates that rewrite, cut or open what they print: answers are learnt behind the prompt that
generation would be given, whole."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from data_samples import CHATML, chat, fast_tokenizer, questions, slow_tokenizer
from tokenizers import AddedToken

from megaskip.config import DataConfig
from megaskip.data import Row
from megaskip.data.fields import Fields, Place
from megaskip.data.formats import Sample, detect_format, normalise
from megaskip.data.inspect import inspect_samples
from megaskip.data.row_text import RowReader
from megaskip.data.tokenize import SampleTokenizer
from megaskip.errors import DataError

COUNTING = "{{ messages | length }}" + CHATML
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and '</think>' in"
    " m.content %}{{ m.content.split('</think>')[-1].lstrip() }}{% else %}{{ m.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Opens a tag for reasoning in the prompt, and leaves reasoning out of every turn."""
CUTTING = THINKING.replace("<think>\n{% endif", "{% endif")
"""Leaves reasoning out, too, but opens no tag."""
LAST_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last"
    " %}{{ m.content.split('</think>')[-1].lstrip() }}{% elif m.role == 'assistant' and '</think>'"
    " not in m.content %}<think>\n\n</think>\n\n{{ m.content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Keeps the reasoning of the last turn only, and prints an empty one there if need be, as Qwen3's
does."""
ANSWER_MARKED = CHATML.replace(
    "{{ m.content }}<",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<",
)
"""Marks answers without their end tokens."""
PART_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[0] }}{% generation %}</think>"
    "{{ m.content.split('</think>')[1] }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Marks what follows the reasoning."""
SECOND_END = CHATML.replace(
    "{% if add_gen", "{% if not add_generation_prompt %}</s>{% endif %}{% if add_gen"
)
"""Ends a conversation with one token more, as Phi's does."""
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
    "{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)

ASKED = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
AGAIN = "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"
REASONED = "<think>\ntwo\n</think>\n\nfine"


def sample_of(fields: dict[str, Any]) -> Sample:
    row = Fields(fields, Place(file="a.jsonl", number=1))
    return normalise(row, format_name=detect_format(row))


def rows_of(fields: dict[str, Any], tokenizer: Any, file: str | None = None) -> tuple[Row, ...]:
    maker = SampleTokenizer(tokenizer, seq_length=512, template_file=file)
    return maker.tokenise(sample_of(fields), source=0).rows


def pieces_of(row: Row, tokenizer: Any) -> tuple[str, str, list[str]]:
    """Return (prompt, what stands between it and the first answer, all answers)."""
    ids, on = row.input_ids.tolist(), row.supervised.tolist()
    runs: list[list[int]] = [[]]
    for token, learnt in zip(ids, on, strict=True):
        if learnt:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    first = on.index(True)
    prompt, between = ids[: row.prompt_length], ids[row.prompt_length : first]
    answers = [tokenizer.decode(run) for run in runs if run]
    return tokenizer.decode(prompt), tokenizer.decode(between), answers


def two_turns(first: str, second: str) -> dict[str, Any]:
    return chat(("user", "hello"), ("assistant", first), ("user", "how"), ("assistant", second))


@pytest.mark.parametrize(
    ("template", "first", "rows"),
    [
        pytest.param(
            COUNTING,
            "fine",
            [
                ("1<s>" + ASKED, "", ["fine<|im_end|>"]),
                ("3<s>" + ASKED + "fine<|im_end|>\n" + AGAIN, "", ["thanks<|im_end|>"]),
            ],
            id="changes what it printed before",
        ),
        pytest.param(
            THINKING,
            REASONED,
            [
                (ASKED + "<think>\n", "", ["two\n</think>\n\nfine<|im_end|>"]),
                (
                    ASKED + "fine<|im_end|>\n" + AGAIN + "<think>\n",
                    "\n</think>\n\n",
                    ["thanks<|im_end|>"],
                ),
            ],
            id="opens reasoning in the prompt",
        ),
        pytest.param(
            CUTTING,
            REASONED,
            [
                (ASKED, "", [REASONED + "<|im_end|>"]),
                (ASKED + "fine<|im_end|>\n" + AGAIN, "", ["thanks<|im_end|>"]),
            ],
            id="leaves reasoning out",
        ),
        pytest.param(
            LAST_ONLY,
            REASONED,
            [
                (ASKED, "", [REASONED + "<|im_end|>"]),
                (
                    ASKED + "fine<|im_end|>\n" + AGAIN,
                    "",
                    ["<think>\n\n</think>\n\nthanks<|im_end|>"],
                ),
            ],
            id="leaves the reasoning of earlier turns out",
        ),
        pytest.param(
            LAST_ONLY,
            "fine",
            [(ASKED, "", ["fine<|im_end|>", "<think>\n\n</think>\n\nthanks<|im_end|>"])],
            id="prints an empty reasoning in the last turn",
        ),
        pytest.param(
            SECOND_END,
            "fine",
            [("<s>" + ASKED, "", ["fine<|im_end|>", "thanks<|im_end|>"])],
            id="ends the conversation with a second token",
        ),
        pytest.param(
            CHATML.replace("m.content", "m.content | upper"),
            "fine",
            [("<s>" + ASKED.replace("hello", "HELLO"), "", ["FINE<|im_end|>", "THANKS<|im_end|>"])],
            id="changes the case",
        ),
        pytest.param(
            ANSWER_MARKED,
            "fine",
            [("<s>" + ASKED, "", ["fine<|im_end|>", "thanks<|im_end|>"])],
            id="marks answers without their end tokens",
        ),
        pytest.param(
            CHATML.partition("{% if add_gen")[0],
            "fine",
            [
                (
                    "<s><|im_start|>user\nhello<|im_end|>\n",
                    "<|im_start|>assistant\n",
                    ["fine<|im_end|>", "thanks<|im_end|>"],
                )
            ],
            id="has no prompt for an answer",
        ),
    ],
)
def test_every_answer_is_learnt_whole_behind_the_prompt_of_generation(
    template: str, first: str, rows: list[tuple[str, str, list[str]]]
) -> None:
    tokenizer = fast_tokenizer(template)
    made = rows_of(two_turns(first, "thanks"), tokenizer)
    assert [pieces_of(row, tokenizer) for row in made] == rows


def test_reasoning_that_a_template_prints_but_does_not_mark_is_not_learnt() -> None:
    tokenizer = fast_tokenizer(PART_MARKED)
    (row,) = rows_of(chat(("user", "hello"), ("assistant", REASONED)), tokenizer)
    learnt = ["</think>\n\nfine<|im_end|>"]
    assert pieces_of(row, tokenizer) == (ASKED, "<think>\ntwo\n", learnt)


def test_text_of_several_rows_of_a_chat_is_shown_with_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(two_turns("fine", "thanks " * 40)))
    config = DataConfig(data=(str(path),), seq_length=48)
    tokenizer = fast_tokenizer(COUNTING)
    maker = SampleTokenizer(tokenizer, seq_length=48)
    ((first, second),) = (outcome.rows for outcome in inspect_samples(config, maker))
    assert first.place.endswith("line 1, answer 1 of 2")
    reader = RowReader(tokenizer, maker, config)
    texts = [reader.read(row) for row in (first, second)]
    assert texts[0] is not None and texts[0].answers() == ["fine<|im_end|>"]
    assert texts[1] is not None and texts[1].spans[-1].text.endswith("thanks <|im_end|>")


def test_template_that_leaves_answers_out_is_an_error() -> None:
    silent = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        DataError, match="line 1: the chat template .* leaves out the text of turn 2"
    ):
        rows_of(two_turns("fine", "thanks"), fast_tokenizer(silent))


def test_vicuna_style_template_keeps_the_start_of_every_answer(tmp_path: Path) -> None:
    (tmp_path / "vicuna.jinja").write_text("\ufeff" + VICUNA, encoding="utf-8")
    tokenizer = fast_tokenizer(bos=False)
    for fields in questions(20):
        (row,) = rows_of(fields, tokenizer, str(tmp_path / "vicuna.jinja"))
        prompt, _, answers = pieces_of(row, tokenizer)
        assert prompt == f"USER: {fields['question']} ASSISTANT: "
        assert answers == [fields["answer"] + "</s>"]


def test_slow_tokenizer_that_would_merge_across_the_border_learns_the_answer(
    tmp_path: Path,
) -> None:
    tokenizer = slow_tokenizer(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    (row,) = rows_of(chat(("user", "hello t"), ("assistant", "hanks")), tokenizer)
    assert pieces_of(row, tokenizer) == ("hello t", "", ["hanks"])


def test_special_token_that_swallows_white_space_leaves_the_answers_own() -> None:
    tokenizer = fast_tokenizer(
        "{% for m in messages %}<|turn|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>{% endif %}"
    )
    tokenizer.add_tokens([AddedToken("<|turn|>", rstrip=True)], special_tokens=True)
    (row,) = rows_of(chat(("user", "hello"), ("assistant", "\n\nfine")), tokenizer)
    assert pieces_of(row, tokenizer)[2] == ["\n\nfine<|im_end|>"]


# -- tool calls


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ CALL }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize(
    ("call", "learnt"),
    [
        ("'x: ' + c.function.arguments", 'x: {"x":1, "y": "\u4f60"}'),
        ("c.function.arguments", '{"x":1, "y": "\u4f60"}'),
        ("c.function.arguments | tojson", '{"x": 1, "y": "\u4f60"}'),
        ("c.function.arguments.x", "1"),
        ("c.function.arguments.items() | list | length", "2"),
    ],
)
@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_are_objects_or_json_text_as_the_template_wants(
    call: str, learnt: str, as_text: bool
) -> None:
    text = '{"x":1, "y": "\u4f60"}'
    function = {"name": "f", "arguments": text if as_text else json.loads(text)}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    tokenizer = fast_tokenizer(CALLS.replace("CALL", call))
    (row,) = rows_of({"messages": [{"role": "user", "content": "hello"}, turn]}, tokenizer)
    expected = learnt if as_text else learnt.replace('"x":1', '"x": 1')
    assert pieces_of(row, tokenizer)[2] == [expected + "<|im_end|>"]


@pytest.mark.parametrize("first", ["{}", "refuse"])
def test_rows_that_do_not_tell_what_a_template_wants_leave_it_open(first: str) -> None:
    refusing = "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    template = refusing + CALLS.replace("CALL", "c.function.arguments")
    maker = SampleTokenizer(fast_tokenizer(template), seq_length=512)

    def text_of(question: str, arguments: dict[str, Any]) -> str:
        call = {"function": {"name": "f", "arguments": arguments}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call]}
        fields = {"messages": [{"role": "user", "content": question}, turn]}
        return maker.template.open(sample_of(fields)).text()

    if first == "refuse":
        with pytest.raises(DataError, match="rejects this conversation"):
            text_of("refuse", {"x": 1})
    else:
        assert "{}" in text_of("hello", {})
    assert '{"x": 1}' in text_of("hello", {"x": 1})


# -- errors


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "is not valid Jinja, line 1 (Unexpected end of template"),
        ("{{ messages[0].content.index('z') }}", "rejects this conversation of user > assistant"),
        ("{{ 1 // 0 }}", "rejects this conversation of user > assistant"),
    ],
)
def test_template_that_fails_is_one_sentence(template: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        rows_of(two_turns("fine", "thanks"), fast_tokenizer(template))


def test_answers_behind_a_closed_tag_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows_of(two_turns("fine", "thanks"), fast_tokenizer(THINKING))
    assert caplog.text.count("begins every answer with <think>") == 1
