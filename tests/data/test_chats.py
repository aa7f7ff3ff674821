"""Rows of every format as conversations for a chat template."""

import json

import pytest

from qlora_jax.data.formats import FORMATS, stream_chats
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Request


def format_chats(rows, format):
    """All conversations, and the number of rows without one."""
    of_rows = list(stream_chats(rows, format))
    return [chat for found in of_rows for chat in found], sum(not found for found in of_rows)


def chats(format, *rows):
    found, left_out = format_chats([Row("f", number, fields) for number, fields in enumerate(rows, 1)], format)
    return [chat.messages for chat in found], left_out


def turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("format", "row", "question"),
    [
        ("alpaca", {"instruction": "Sort.", "input": "b a", "output": "A"}, "Sort.\n\nb a"),
        ("alpaca", {"instruction": "Sort.", "input": " ", "output": "A"}, "Sort."),
        ("input-output", {"input": " Q ", "output": "A"}, " Q "),
        ("longform", {"input": "Q", "output": "A"}, "Q"),
        ("dolly", {"instruction": "Q", "context": "C", "response": "A"}, "Q\n\nC"),
        ("dolly", {"prompt": "P", "answer": "A"}, "P"),
        ("self-instruct", {"prompt": "P", "completion": "A"}, "P"),
        ("self-instruct", {"instruction": "Q", "instances": [{"input": "I", "output": "A"}]}, "Q\n\nI"),
        (
            "unnatural-instructions",
            {"instruction": "Q", "instances": [{"instruction_with_input": "Q I", "constraints": "C", "output": "A"}]},
            "Q I\nC",
        ),
        ("flan-v2", {"inputs": "Q", "targets": "A"}, "Q"),
        ("chip2", {"text": "<human>: Q\n<bot>: A"}, "Q"),
    ],
)
def test_instructions_are_a_question_and_an_answer(format, row, question):
    assert chats(format, row) == ([turns(question, "A")], 0)


def test_a_question_is_what_generate_asks():
    asked = Request("Sort.", "b a", form="instruction").message
    assert chats("alpaca", {"instruction": "Sort.", "input": "b a", "output": "A"})[0][0][0]["content"] == asked


def test_conversations_end_with_their_last_answer():
    tree = {"text": "Q ", "role": "prompter", "replies": [{"text": "A", "role": "assistant", "replies": []}]}
    assert chats("oasst1", {"prompt": tree}, {"text": "### Human: Q### Assistant: A### Human: why?"}) == (
        [turns("Q ", "A"), turns("Q", "A")],
        0,
    )
    talk = "\n\nHuman: Q \n\nAssistant: A\n\nmore\n\nHuman: bye\n\nAssistant: "
    assert chats("hh-rlhf", {"chosen": talk}, {"chosen": "\n\nHuman: Q"}) == ([turns("Q", "A\n\nmore")], 1)
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert chats("sharegpt", row, {"conversations": []}) == ([turns("Q", "A")], 1)


def test_messages_with_tools():
    call = {"id": "1", "type": "function", "index": None, "function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {
        "tools": json.dumps(tools),
        "messages": [
            {"role": "developer", "content": "S", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
            {"role": "assistant", "content": "3", "tool_calls": None},
            {"role": "user", "content": "thanks"},
        ],
    }
    (found,), left_out = format_chats([Row("f", 1, row)], "messages")
    made = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert left_out == 0 and found.tools == tools and found.where == "f, line 1"
    assert found.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [made]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "3"},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "expected system, .* tool, observation, function or function_call in the field role, found 'robot'",
        ),
        ({"messages": [{"role": "user"}]}, 'no field "content"'),
        ({"messages": turns("Q", "A"), "tools": "{"}, "expected JSON in the field tools, found '{'"),
        ({"messages": turns("Q", "A"), "tools": {"a": 1}}, "expected a list in the field tools"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "expected JSON in the field tool_calls",
        ),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "sharegpt reads it"),
    ],
)
def test_bad_rows(row, reason):
    with pytest.raises(InputError, match=f"f, line 1: .*{reason}"):
        chats("messages", row)


@pytest.mark.parametrize(
    ("format", "file"),
    [
        ("alpaca", "alpaca/alpaca_small.json"),
        ("oasst1", "oasst1/en_100_tree.jsonl"),
        ("hh-rlhf", "hh_rlhf/harmless-base/test.jsonl.gz"),
    ],
)
def test_real_rows_are_chats(shared_data, format, file):
    rows = read_rows(str(shared_data / file))
    found, left_out = format_chats(rows, format)
    assert len(found) + left_out == len(rows) and len(found) > 90
    assert all(chat.messages[-1]["role"] == "assistant" and chat.messages[-1]["content"].strip() for chat in found)


def test_every_format_gives_chats():
    with pytest.raises(InputError, match="unknown data.format"):
        format_chats([], "alpacca")
    assert all(format_chats([], format) == ([], 0) for format in FORMATS)
