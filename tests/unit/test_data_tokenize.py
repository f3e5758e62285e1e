"""Only assistant turns are learnt, exactly, with any template and tokenizer; no loss is silent."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
from data_samples import (
    CHATML,
    FORGETFUL,
    MARKED,
    chat,
    fast_tokenizer,
    learnt_text,
    slow_tokenizer,
)
from tokenizers import processors

from megaskip.data import Row
from megaskip.data.fields import Fields, Place
from megaskip.data.formats import detect_format, normalise
from megaskip.data.plain_text import PlainTextEncoder
from megaskip.data.stats import SourceStats, check_losses
from megaskip.data.tokenize import SampleTokenizer, Tokenised
from megaskip.data.tokenizer import load_tokenizer
from megaskip.errors import ConfigError, DataError

PLACE = Place(file="a.jsonl", number=1)
TWO_TURNS = chat(("user", "hello"), ("assistant", "fine"), ("user", "how"), ("assistant", "thanks"))


def tokenise(
    fields: dict[str, Any], tokenizer: Any, *, seq_length: int = 512, file: str | None = None
) -> Tokenised:
    row = Fields(fields, PLACE)
    sample = normalise(row, format_name=detect_format(row))
    maker = SampleTokenizer(tokenizer, seq_length=seq_length, template_file=file)
    return maker.tokenise(sample, source=0)


def row_of(fields: dict[str, Any], tokenizer: Any, **options: Any) -> Row:
    (row,) = tokenise(fields, tokenizer, **options).rows
    return row


def learnt_runs(row: Row, tokenizer: Any) -> list[str]:
    """Return each unbroken stretch of learnt tokens as text."""
    runs: list[list[int]] = [[]]
    for token, on in zip(row.input_ids.tolist(), row.supervised.tolist(), strict=True):
        if on:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistant_turn_is_learnt_with_its_end_and_nothing_else(
    template: str,
) -> None:
    tokenizer = fast_tokenizer(template)
    row = row_of(TWO_TURNS, tokenizer)
    assert learnt_runs(row, tokenizer) == ["fine<|im_end|>", "thanks<|im_end|>"]
    prompt = "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.input_ids[: row.prompt_length].tolist()) == prompt


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_turn_of_weight_zero_is_not_learnt(template: str) -> None:
    tokenizer = fast_tokenizer(template)
    fields = chat(
        ("user", "hello"), ("assistant", "fine"), ("user", "how"), ("assistant", "thanks")
    )
    fields["messages"][1]["loss_weight"] = 0
    (learnt,) = learnt_runs(row_of(fields, tokenizer), tokenizer)
    assert learnt.strip() == "thanks<|im_end|>"


def test_answer_that_also_stands_in_the_question_is_learnt_only_as_the_answer() -> None:
    tokenizer = fast_tokenizer()
    row = row_of(chat(("user", "fine fine"), ("assistant", "fine")), tokenizer)
    assert learnt_runs(row, tokenizer) == ["fine<|im_end|>"]


def test_labels_are_unshifted_ids_and_the_first_is_never_one() -> None:
    row = row_of({"text": "hello world"}, fast_tokenizer(bos=False))
    assert row.labels.tolist() == [-100, *row.input_ids[1:].tolist()]


def test_markers_that_miss_a_turn_give_way_to_renderings(caplog: pytest.LogCaptureFixture) -> None:
    once = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
    tokenizer = fast_tokenizer(once)
    with caplog.at_level(logging.WARNING):
        row = row_of(TWO_TURNS, tokenizer)
    assert learnt_runs(row, tokenizer) == ["fine<|im_end|>", "thanks<|im_end|>"]
    assert "do not cover every assistant turn" in caplog.text


def test_reasoning_that_the_template_drops_later_is_not_an_obstacle() -> None:
    tokenizer = fast_tokenizer(FORGETFUL)
    row = row_of(TWO_TURNS, tokenizer)
    assert learnt_runs(row, tokenizer) == ["fine<|im_end|>", "a b c\n\nthanks<|im_end|>"]


def test_white_space_at_the_end_of_a_template_file_is_no_obstacle() -> None:
    tokenizer = fast_tokenizer(CHATML + " \n\n")
    row = row_of(TWO_TURNS, tokenizer)
    assert [run.rstrip() for run in learnt_runs(row, tokenizer)] == [
        "fine<|im_end|>",
        "thanks<|im_end|>",
    ]


def test_template_that_rejects_the_roles_is_an_error_with_its_own_words() -> None:
    strict = "{{ raise_exception('only user and assistant') }}"
    message = "rejects this conversation of user > assistant > user > assistant (only user and"
    with pytest.raises(DataError, match=re.escape(message)):
        row_of(TWO_TURNS, fast_tokenizer(strict))


def test_several_templates_without_a_default_are_an_error_that_names_them() -> None:
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(DataError, match=r"line 1: .* \(rag, tool_use\) and none is the default"):
        row_of(TWO_TURNS, tokenizer)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_half_a_character_in_a_tool_call_is_an_error_with_its_place(template: str) -> None:
    call = {"name": "f", "arguments": {"x": "hi \ud83d"}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    fields = {"messages": [{"role": "user", "content": "hello"}, turn]}
    with pytest.raises(DataError, match=r"line 1: .* holds '\\ud83d', half of a character"):
        row_of(fields, fast_tokenizer(template))


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("tokenizer.json", '"type": "BPE"', '"type": "Later"', "did not match any variant"),
        ("tokenizer.json", '"version": "1.0"', '"version": "2.0"', "Unknown tokenizer version"),
        ("tokenizer.json", "{", "[", ""),
        ("tokenizer_config.json", '"eos_token": "</s>"', '"eos_token": 3', "eos_token has to be"),
        ("tokenizer_config.json", '"tokenizer_class": "', '"tokenizer_class": 3, "x": "', ""),
        ("tokenizer_config.json", "{", "", ""),
    ],
)
def test_tokenizer_files_of_an_unknown_kind_are_one_sentence(
    file: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    fast_tokenizer().save_pretrained(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"no tokenizer in .*{says}"):
        load_tokenizer(tmp_path)


def test_template_without_tools_gets_calls_as_text_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"}
    fields = {"messages": [{"role": "user", "content": "hello"}, turn], "tools": [{"name": "f"}]}
    tokenizer = fast_tokenizer()
    with caplog.at_level(logging.WARNING):
        row = row_of(fields, tokenizer)
    assert learnt_text(row, tokenizer) == '{"name": "f", "arguments": {"x": 1}}<|im_end|>'
    for name in ("tools", "tool_calls", "thinking"):
        assert f"never mentions {name}:" in caplog.text


def test_template_with_tools_gets_calls_and_tools() -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
        "<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.x }}"
        "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    call = {"name": "f", "arguments": {"x": "seven"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    fields = {"messages": [{"role": "user", "content": "hello"}, turn], "tools": [{"name": "g"}]}
    tokenizer = fast_tokenizer(template)
    row = row_of(fields, tokenizer)
    assert learnt_text(row, tokenizer) == "seven<|im_end|>"
    assert tokenizer.decode(row.input_ids.tolist()).startswith("g<|im_start|>hello")


@pytest.mark.parametrize("fields", [TWO_TURNS, {"question": "Q", "answer": "A"}])
def test_chat_without_template_is_an_error_that_names_the_ways_out(fields: dict[str, Any]) -> None:
    tokenizer = fast_tokenizer(None)
    tokenizer.name_or_path = "models/tiny"
    message = (
        "the tokenizer in models/tiny has no chat template: pass --chat_template FILE.jinja, "
        "or use prompt/completion or plain text data"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        tokenise(fields, tokenizer)


def test_template_file_overrides_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    tokenizer = fast_tokenizer()
    row = row_of(TWO_TURNS, tokenizer, file=str(tmp_path / "t.jinja"))
    assert tokenizer.decode(row.input_ids.tolist()) == "hello</s>fine</s>how</s>thanks</s>"
    with pytest.raises(
        DataError, match=r"--chat_template 'no\.jinja' cannot be read: No such file"
    ):
        row_of(TWO_TURNS, tokenizer, file="no.jinja")


def test_prompt_completion_without_template_is_joined_and_ended() -> None:
    tokenizer = fast_tokenizer(None)
    row = row_of({"prompt": "what is two", "completion": " plus two"}, tokenizer)
    assert tokenizer.decode(row.input_ids.tolist()) == "<s>what is two plus two</s>"
    assert learnt_text(row, tokenizer) == " plus two</s>"
    alone = tokenizer("what is two").input_ids
    assert row.input_ids[: row.prompt_length].tolist() == alone


def test_completion_that_would_merge_with_the_prompt_leaves_the_prompts_tokens_alone() -> None:
    tokenizer = fast_tokenizer(None, bos=False)
    prompt, completion = "the answ", "er is four"
    merged = tokenizer(prompt + completion).input_ids
    alone = tokenizer(prompt).input_ids
    assert merged[: len(alone)] != alone
    row = row_of({"prompt": prompt, "completion": completion}, tokenizer)
    assert row.input_ids[: row.prompt_length].tolist() == alone
    assert learnt_text(row, tokenizer) == completion + "</s>"


def test_empty_prompt_counts_as_no_prompt() -> None:
    assert row_of({"prompt": "", "completion": "hello"}, fast_tokenizer(None)).prompt_length == 0


@pytest.mark.parametrize("fields", [TWO_TURNS, {"text": "<s>hello"}, {"text": "hello"}])
def test_begin_token_is_there_once(fields: dict[str, Any]) -> None:
    ids = row_of(fields, fast_tokenizer()).input_ids.tolist()
    assert (ids[0], ids.count(1)) == (1, 1)


def test_no_begin_token_where_the_tokenizer_adds_none() -> None:
    assert 1 not in row_of({"text": "hello"}, fast_tokenizer(bos=False)).input_ids


@pytest.mark.parametrize(
    ("rule", "start"),
    [
        ("$A", []),
        ("<s> $A", [1]),
        ("<|im_start|> <s> $A", [4, 1]),  # as GLM's
        ("<s> $A </s>", [1]),
        ("$A </s>", []),  # add_eos_token
    ],
)
def test_plain_text_begins_as_the_tokenizer_begins_it_and_ends_once(
    rule: str, start: list[int]
) -> None:
    tokenizer = fast_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=rule, special_tokens=[("<s>", 1), ("</s>", 2), ("<|im_start|>", 4)]
    )
    text = tokenizer("hello", add_special_tokens=False).input_ids
    begun = tokenizer.decode(start) + "hello"
    for written in ("hello", begun):
        row = row_of({"text": written}, tokenizer)
        assert row.input_ids.tolist() == [*start, *text, 2]
        assert learnt_text(row, tokenizer) == ("hello</s>" if start else "ello</s>")
        assert PlainTextEncoder(tokenizer).encode(written) == [*start, *text]


def test_plain_text_is_split_into_windows_and_loses_no_token() -> None:
    tokenizer = fast_tokenizer()
    text = "hello world how are you today " * 20
    rows = tokenise({"text": text}, tokenizer, seq_length=32).rows
    ids = [token for row in rows for token in row.input_ids.tolist()]
    assert ids == [1, *tokenizer(text, add_special_tokens=False).input_ids, 2]
    assert {len(row) for row in rows[:-1]} == {32}
    assert all(row.supervised.tolist() == [False] + [True] * (len(row) - 1) for row in rows)
    assert {row.prompt_length for row in rows} == {0}


def test_long_chat_is_cut_on_the_right_and_counted() -> None:
    tokenizer = fast_tokenizer()
    whole = row_of(TWO_TURNS, tokenizer)
    cut = tokenise(TWO_TURNS, tokenizer, seq_length=whole.prompt_length + 1)
    assert cut.truncated and not cut.dropped
    assert cut.rows[0].input_ids.tolist() == whole.input_ids[: whole.prompt_length + 1].tolist()
    gone = tokenise(TWO_TURNS, tokenizer, seq_length=whole.prompt_length)
    assert gone.truncated and gone.dropped and gone.rows == ()


def test_sample_without_anything_to_learn_is_dropped_not_masked() -> None:
    assert tokenise(chat(("user", "hello")), fast_tokenizer()).dropped
    assert tokenise({"text": ""}, fast_tokenizer(None)).dropped


def test_losing_more_than_half_warns_and_losing_all_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stats = SourceStats(
        name="a.jsonl", samples=10, rows=4, tokens=9, supervised_tokens=4, cut_away=6
    )
    with caplog.at_level(logging.WARNING):
        check_losses([stats], seq_length=16)
    text = "6 of 10 samples are dropped: 6 lost every supervised token to --seq_length 16"
    assert text in caplog.text
    with pytest.raises(
        DataError, match="no supervised token is left in 3 samples: 2 lost .* 1 have"
    ):
        check_losses([SourceStats(name="a", samples=3, cut_away=2, unlearnable=1)], seq_length=16)
    with pytest.raises(DataError, match="the data hold no samples at all"):
        check_losses([SourceStats(name="a")], seq_length=16)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_sentencepiece_learns_what_a_fast_tokenizer_learns(tmp_path: Path, template: str) -> None:
    tokenizer = slow_tokenizer(tmp_path, template)
    assert not tokenizer.is_fast
    row = row_of(TWO_TURNS, tokenizer)
    runs = [re.sub(r"\s+", "", run) for run in learnt_runs(row, tokenizer)]
    assert runs == ["fine<|im_end|>", "thanks<|im_end|>"]
    assert row.input_ids.tolist().count(1) == 1


def test_sentencepiece_reads_plain_text_and_prompts(tmp_path: Path) -> None:
    tokenizer = slow_tokenizer(tmp_path, None)
    assert row_of({"text": "hello world"}, tokenizer).input_ids[-1] == 2
    row = row_of({"prompt": "what is two", "completion": "four"}, tokenizer)
    assert learnt_text(row, tokenizer).replace(" ", "") == "four</s>"
