"""Every data format reaches the same normal form, and a wrong row says where and why."""

import json
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


ROWS = [
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"instruction": "Q", "input": "", "output": "A"},
    {"prompt": "Q", "completion": "A"},
    {"question": "Q", "answer": "A"},
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("key", ["system", "System_Prompt"])
def test_system_context_and_tools_columns_are_used_in_every_format_of_chats(
    row: dict[str, Any], key: str
) -> None:
    sample = read({**row, key: "S", "context": "C", "tools": [{"name": "f"}]})
    assert turns(sample) == [
        ("system", "S", False),
        ("user", "C\n\nQ", False),
        ("assistant", "A", True),
    ]
    assert len(sample.tools) == 1 and not sample.joinable
    empty = {key: "", "context": [], "tools": "", "images": [], "video": None}
    assert turns(read({**row, **empty})) == [("user", "Q", False), ("assistant", "A", True)]


def test_system_column_that_repeats_the_system_turn_is_not_doubled() -> None:
    system = {"role": "system", "content": "S"}
    sample = read(
        {"messages": [system, *ROWS[0]["messages"]], "system": "S", "context": ["C", "D"]}
    )
    assert [m.content for m in sample.messages] == ["S", "C\n\nD\n\nQ", "A"]


def test_fields_that_only_sound_like_a_switch_or_media_are_ignored() -> None:
    row = {"messages": [ROWS[0]["messages"][0], {**REPLY, "learning_goal": "addition"}]}
    ignored = {"train_sources": ["a", "b"], "loss": 2.5, "image": False, "imagery": "none"}
    assert turns(read({**row, **ignored})) == turns(read(ROWS[0]))


def test_chats_may_be_json_text_as_in_csv_files() -> None:
    assert turns(read({"messages": json.dumps(ROWS[0]["messages"])})) == turns(read(ROWS[0]))


def test_null_keys_of_arrow_leave_tools_and_arguments_but_not_json_text() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "string"}, "y": None}}
    call = {"function": {"name": "f", "arguments": {"x": "1", "y": None, "z": [{"a": None}]}}}
    text = {"function": {"name": "g", "arguments": '{"x": null}'}, "id": None}
    turn = {"role": "assistant", "content": None, "tool_calls": [call, text]}
    row = {"messages": [ROWS[0]["messages"][0], turn]}
    sample = read({**row, "tools": [{"name": "f", "description": None, "parameters": parameters}]})
    first, second = sample.messages[1].tool_calls
    assert first["function"]["arguments"] == {"x": "1", "z": [{}]}
    assert second["function"]["arguments"] == {"x": None}
    properties = {"type": "object", "properties": {"x": {"type": "string"}}}
    assert sample.tools[0]["function"] == {"name": "f", "parameters": properties}


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


def two_answers(style: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return a chat in which both answers have fields of their own."""
    if style == "messages":
        ask, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    else:
        ask, answer = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
    key = "messages" if style == "messages" else "conversations"
    return {key: [ask, {**answer, **first}, ask, {**answer, **second}]}


@pytest.mark.parametrize("style", ["messages", "sharegpt"])
@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss", "train", "train_on_turn", "mask"])
@pytest.mark.parametrize(
    ("off", "on"), [(0, 1), (0.0, 1.0), (False, True), ("false", "True"), (False, None)]
)
def test_switch_takes_one_turn_out_of_the_loss(style: str, key: str, off: Any, on: Any) -> None:
    if key == "mask":
        off, on = on, off
    if None in (off, on):  # Arrow writes null where a turn has no such field
        off, on = (True, None) if key == "mask" else (False, None)
    sample = read(two_answers(style, {key: off}, {key: on}))
    assert [message.train for message in sample.messages] == [False, False, False, True]


def test_numbers_that_look_like_a_loss_mask_are_not_taken_for_its_opposite() -> None:
    row = two_answers("messages", {"mask": 0}, {"mask": 1})
    row["messages"][0] = {**ASK, "mask": 0}
    with pytest.raises(DataError, match=r"Rename the field to 'train' if 1 means that a turn is"):
        read(row)
    for mask in (False, None):  # every turn has the field: only the masked one leaves the loss
        row["messages"][0] = {**ASK, "mask": mask}
        assert [message.train for message in read(row).messages] == [False, True, False, False]


ASK = {"role": "user", "content": "Q"}
REPLY = {"role": "assistant", "content": "A"}
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
        "field 'messages[1].loss_weight' is the number -1; expected 0 or 1, false or true",
    ),
    (
        {"messages": [ASK, {**REPLY, "weight": 0.5}]},
        "field 'messages[1].weight' is the number 0.5; expected 0 or 1, false or true: a turn is",
    ),
    (
        {"messages": [ASK, {**REPLY, "weight": 1, "train": False}]},
        "field 'messages[1].train' is the truth value false; expected what 'weight' says (1)",
    ),
    (
        {"messages": [ASK, {**REPLY, "loss_scale": 0.0}]},
        "field 'messages[1].loss_scale' is the number 0.0; expected another field of a turn",
    ),
    (
        {"messages": [ASK, {**REPLY, "Train_Detail": [{"train": False}]}]},
        "field 'messages[1].train_detail' is the list",
    ),
    (
        {"conversations": [{"from": "human", "value": "Q", "no_loss": True}]},
        "field 'conversations[0].no_loss' is the truth value true; expected another field",
    ),
    (
        {"messages": [ASK, REPLY], "loss_mask": [0, 1]},
        "field 'loss_mask' is the list [0, 1]; expected another field of a turn (weight",
    ),
    (
        {"messages": [ASK, REPLY], "Images": ["a.png"]},
        "field 'images' is the list [\"a.png\"]; expected no media: megaskip trains on text only",
    ),
    ({"text": "a cat", "image": {"bytes": b"x", "path": None}}, "field 'image' is the object"),
    ({"text": "a cat", "jpg": {"bytes": b"x", "path": None}}, "field 'jpg' is the object"),
    ({"question": "Q", "answer": "A", "audio_path": "a.wav"}, "field 'audio_path' is the text"),
    (
        {"messages": [{**ASK, "videos": ["a.mp4"]}, REPLY]},
        "field 'messages[0].videos' is the list [\"a.mp4\"]; expected no media",
    ),
    (
        {"question": "<image>\nQ", "answer": "A", "image_id": 7},
        "field 'image_id' is the number 7; expected no media: '<image>' in the text stands for",
    ),
    (
        {"conversations": [{"from": "human", "value": [{"type": "image", "image": "a.png"}]}]},
        "field 'conversations[0].value[0].type' is the text \"image\"; expected 'text'",
    ),
    (
        {"messages": [{"role": "system", "content": "S"}, ASK, REPLY], "system_prompt": "T"},
        "field 'system_prompt' is the text \"T\"; expected the text of the system turn",
    ),
    (
        {"question": "Q", "answer": "A", "system": "S", "system_prompt": "T"},
        "field 'system_prompt' is the text \"T\"; expected the text of 'system', or only one",
    ),
    (
        {"question": "Q", "answer": "A", "context": {"title": ["T"]}},
        'field \'context\' is the object {"title": ["T"]}; expected text',
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
