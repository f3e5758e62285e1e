"""Every data format reaches the same normal form, and a wrong row says where and why."""

import re
from typing import Any

import pytest

from megaskip.data.fields import Fields, Place
from megaskip.data.formats import FORMATS, Sample, detect_format, normalise
from megaskip.errors import DataError

PLACE = Place(file="file.jsonl", number=7)


def read(fields: dict[str, Any]) -> Sample:
    row = Fields(fields, PLACE)
    return normalise(row, format_name=detect_format(row))


def turns(sample: Sample) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in sample.messages]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("messages", {"messages": []}),
        ("sharegpt", {"conversations": [], "tools": "[]"}),
        ("alpaca", {"instruction": "", "input": "", "output": "", "text": "", "prompt": ""}),
        ("prompt/completion", {"prompt": "", "completion": "", "id": 3}),
        ("question/answer", {"Question": "", "qtype": "", "Answer": ""}),
        ("plain text", {"text": "", "meta": {}}),
    ],
)
def test_format_is_told_by_its_keys_in_any_case(name: str, fields: dict[str, Any]) -> None:
    assert detect_format(Fields(fields, PLACE)) == name


def test_unknown_keys_are_an_error_that_lists_formats_and_suggests() -> None:
    with pytest.raises(DataError) as error:
        detect_format(Fields({"promt": "a", "completion": "b"}, PLACE))
    text = str(error.value)
    assert text.startswith("file.jsonl, line 7: found fields 'promt', 'completion'")
    assert all(name in text for name in FORMATS)
    assert "did you mean 'prompt' instead of 'promt'?" in text


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "Q", "answer": "A"},
        {"QUESTION": "Q", "Answer": "A"},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "output": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ],
)
def test_every_format_becomes_a_question_without_and_an_answer_with_loss(
    fields: dict[str, Any],
) -> None:
    assert turns(read(fields)) == [("user", "Q", False), ("assistant", "A", True)]


def test_plain_text_has_no_messages() -> None:
    assert (read({"text": "abc"}).text, read({"text": "abc"}).messages) == ("abc", ())


def test_alpaca_joins_input_system_and_history() -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]}
    assert turns(read(row)) == [
        ("system", "S", False),
        ("user", "q", False),
        ("assistant", "a", True),
        ("user", "Q\n\nI", False),
        ("assistant", "A", True),
    ]


def test_sharegpt_tool_calls_become_tool_calls_and_observations_tool_turns() -> None:
    sample = read(
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": '[{"name": "f"}]',
        }
    )
    assert [m.role for m in sample.messages] == ["user", "assistant", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert sample.messages[1].tool_calls == (call,) and sample.messages[1].train
    assert sample.tools == ({"type": "function", "function": {"name": "f"}},)


def test_openai_tool_calls_get_their_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    sample = read({"messages": [{"role": "user", "content": "Q"}, turn]})
    assert sample.messages[1].tool_calls[0] == {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": {"x": 1}},
    }
    assert sample.messages[1].content == ""


def test_content_parts_are_joined_whatever_their_text_is_called() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}]}).messages[0].content == "ab"


@pytest.mark.parametrize(("weight", "train"), [(0, False), (0.0, False), (1, True), (0.5, True)])
def test_loss_weight_zero_switches_a_turn_off(weight: float, train: bool) -> None:
    turn = {"role": "assistant", "content": "A", "loss_weight": weight}
    assert read({"messages": [{"role": "user", "content": "Q"}, turn]}).messages[1].train is train


ASK = {"role": "user", "content": "Q"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"question": "Q", "answer": 3}, "field 'answer' is the number 3; expected text"),
    ({"text": ["a"]}, "field 'text' is the list [\"a\"]; expected text"),
    ({"text": "hi \ud83d"}, "field 'text' is the text \"hi ?\"; expected text of whole characters"),
    ({"conversations": "hi"}, "field 'conversations' is the text \"hi\"; expected a list"),
    ({"messages": []}, "field 'messages' is the list []; expected at least one entry"),
    ({"messages": ["hi"]}, "field 'messages[0]' is the text \"hi\"; expected an object"),
    (
        {"conversations": [{"from": "human"}]},
        "field 'conversations[0].value' is missing; found 'from'",
    ),
    (
        {"messages": [ASK, {"role": "assistent", "content": "A"}]},
        "field 'messages[1].role' is the text \"assistent\"; expected one of",
    ),
    ({"messages": [{"role": "assistent", "content": "A"}]}, "did you mean 'assistant'?"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
        "field 'messages[0].content[0].type' is the text \"image\"; expected 'text' (megaskip",
    ),
    (
        {"messages": [{**ASK, "loss_weight": 1}]},
        "field 'messages[0].loss_weight' is the number 1; expected 0, since a user turn",
    ),
    (
        {"messages": [ASK, {"role": "assistant", "content": "A", "loss_weight": -1}]},
        "field 'messages[1].loss_weight' is the number -1; expected a number from 0",
    ),
    (
        {"messages": [{"role": "assistant", "content": "A"}]},
        "the conversation begins with an assistant turn",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "f(x)"}]},
        "field 'conversations[0].value' is the text \"f(x)\"; expected a tool call",
    ),
    (
        {"conversations": [{"from": "human", "value": "Q"}], "tools": "none"},
        "field 'tools' is the text \"none\"; expected a list of tools",
    ),
    (
        {"instruction": "Q", "output": "A", "history": [["q"]]},
        "field 'history[0]' is the list [\"q\"]; expected a pair of texts",
    ),
    ({"question": None, "answer": "A"}, "field 'question' is empty: null; expected text"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_row_names_place_field_found_and_expected(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(fields)
    assert str(error.value).startswith("file.jsonl, line 7: ")


def test_later_row_of_another_format_is_an_error() -> None:
    row = Fields({"question": "Q", "reply": "A"}, PLACE)
    with pytest.raises(DataError, match="field 'answer' is missing; found 'question', 'reply'"):
        normalise(row, format_name="question/answer")
