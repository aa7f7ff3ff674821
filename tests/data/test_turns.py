"""Turns of chats in the forms that data comes in, what they say besides text, and which of them are to be learned."""

import json

import numpy as np
import pytest

from qlora_jax.data.examples import Lengths, tokenize_examples
from qlora_jax.data.formats import stream_chats, stream_texts
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

SAID = ("Q", "BAD", "wrong", "good")


def texts(format, *rows):
    made = stream_texts([Row("f", number, row) for number, row in enumerate(rows, 1)], format)
    return [text for of_row in made for text in of_row]


def chats(format, *rows):
    made = stream_chats([Row("f", number, row) for number, row in enumerate(rows, 1)], format)
    return [chat for of_row in made for chat in of_row]


def openai(*contents, **marks):
    """Turns, the marks {"turn_1": {...}} added to them by number."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": [turn | marks.get(f"turn_{n}", {}) for n, turn in enumerate(turns)]}


def sharegpt(*contents, **marks):
    names = {"user": "human", "assistant": "gpt"}
    turns = openai(*contents)["messages"]
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    return {"conversations": [turn | marks.get(f"turn_{n}", {}) for n, turn in enumerate(turns)]}


def learned(text):
    """The target of a text with what is given of it in brackets."""
    shown, at = "", 0
    for begin, end in text.given:
        shown += f"{text.target[at:begin]}[{text.target[begin:end]}]"
        at = end
    return shown + text.target[at:]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": 0}, {"loss": False}])
@pytest.mark.parametrize(("format", "row"), [("messages", openai), ("sharegpt", sharegpt)])
def test_an_answer_not_to_be_learned_is_context(format, row, mark, byte_tokenizer):
    bad = row(*SAID, turn_1=mark)
    (text,) = texts(format, bad)
    assert learned(text) == "### Human: Q\n[### Assistant: BAD\n]### Human: wrong\n### Assistant: good"
    example = tokenize_examples([text], byte_tokenizer, Lengths(0, 0))[0][0]
    said = byte_tokenizer.decode(example.tokens[example.loss_mask])
    assert said == "### Human: Q\n### Human: wrong\n### Assistant: good" and example.loss_mask[-1]
    assert byte_tokenizer.decode(example.tokens[~example.loss_mask]) == "### Assistant: BAD\n"
    everything = tokenize_examples([text], byte_tokenizer, Lengths(0, 0), train_on_source=True)[0][0]
    assert np.array_equal(everything.loss_mask, example.loss_mask)
    (chat,) = chats(format, bad)
    assert chat.learn == (False, False, False, True)
    assert chat.messages == openai(*SAID)["messages"]


def test_without_marks_or_with_all_of_them_nothing_changes():
    plain = texts("messages", openai(*SAID))
    assert plain[0].given == () and chats("messages", openai(*SAID))[0].learn is None
    marked = openai(*SAID, turn_1={"weight": 1}, turn_3={"weight": 1.0}), openai(*SAID, turn_1={"weight": None})
    assert texts("messages", *marked) == [plain[0], type(plain[0])(plain[0].source, plain[0].target, "f, line 2")]
    assert [chat.learn for chat in chats("messages", *marked)] == [None, None]
    # a weight of 1 is the default; OpenChat's rows have one in every turn
    every = openai(*SAID, turn_0={"weight": 0.0}, turn_1={"weight": 1}, turn_2={"weight": 0}, turn_3={"weight": 1})
    assert chats("messages", every)[0].learn is None
    assert learned(texts("messages", every)[0]) == (
        "[### Human: Q\n]### Assistant: BAD\n[### Human: wrong\n]### Assistant: good"
    )


@pytest.mark.parametrize(("format", "row"), [("messages", openai), ("sharegpt", sharegpt)])
def test_a_chat_ends_with_its_last_learned_answer(format, row):
    """What follows it is context for nothing; without one there is no example."""
    rows = [
        row(*SAID, turn_3={"weight": 0}),
        row(*SAID, turn_1={"weight": 0}, turn_3={"weight": 0}),
        row("Q", "BAD", turn_1={"train": False}),
    ]
    assert [(text.target, text.given) for text in texts(format, *rows)] == [("### Human: Q\n### Assistant: BAD", ())]
    assert [(chat.messages, chat.learn) for chat in chats(format, *rows)] == [(openai("Q", "BAD")["messages"], None)]


def test_no_turn_of_a_conversation_that_is_learned_by_halves():
    for mark, found in (
        ({"weight": 0.5}, "expected 0 or 1, false or true, in the field weight of a turn .*, found 0.5"),
        ({"weight": 2}, "found 2"),
        ({"weight": -1}, "found -1"),
        ({"weight": float("nan")}, "found nan"),
        ({"train": "yes"}, "in the field train of a turn .*, found text"),
        ({"weight": 1, "train": False}, "weight and train of a turn contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}, "the field train_detail"),
        ({"loss_scale": 0.3}, "the field loss_scale"),
    ):
        for read in (texts, chats):
            with pytest.raises(InputError, match=f"f, line 1: .*{found}"):
                read("messages", openai(*SAID, turn_1=mark))


def test_learning_what_a_form_does_not_learn_is_refused():
    asked = sharegpt(*SAID, turn_2={"train": True})
    assert learned(texts("sharegpt", asked)[0]) == learned(texts("sharegpt", sharegpt(*SAID))[0])
    with pytest.raises(InputError, match=r"f, line 1: a turn of the role user is marked to be learned \(train\)"):
        chats("sharegpt", asked)
    system = {"messages": [{"role": "system", "content": "S", "train": True}, *openai("Q", "A")["messages"]]}
    with pytest.raises(InputError, match="a system turn is marked to be learned"):
        texts("messages", system)


def test_either_form_is_read_under_either_name():
    (plain,) = texts("messages", openai(*SAID))
    mixed = {"messages": sharegpt(*SAID)["conversations"]}, {"conversations": openai(*SAID)["messages"]}
    halves = [{"from": "human", "content": "Q"}, {"role": "gpt", "value": "BAD", "content": None, "from": "assistant"}]
    for format, row in zip(("messages", "sharegpt"), mixed, strict=True):
        assert texts(format, row)[0] == plain
        assert chats(format, row)[0] == chats("messages", openai(*SAID))[0]
    assert texts("sharegpt", {"conversations": halves})[0].target == "### Human: Q\n### Assistant: BAD"
    assert texts("messages", {"messages": halves})[0].target == "### Human: Q\n### Assistant: BAD"
    differing = [
        ([{"role": "user", "from": "gpt", "content": "Q"}], "a turn has both role and from, and they differ"),
        ([{"role": "user", "content": "Q", "value": "P"}], "a turn has both content and value, and they differ"),
        ([{"speaker": "user", "content": "Q"}], 'no field "role"; fields found: speaker, content'),
        ([{"from": "human"}], 'no field "content"; fields found: from'),
    ]
    for turns, reason in differing:
        with pytest.raises(InputError, match=f"f, line 1: {reason}"):
            texts("messages", {"messages": turns})
    with pytest.raises(InputError, match='no field "value"; fields found: from'):
        texts("sharegpt", {"conversations": [{"from": "human"}]})


@pytest.mark.parametrize("read", [texts, chats])
def test_lists_as_json_text(read):
    """As CSV files and some Parquet files have them."""
    for format, row in (("messages", openai(*SAID)), ("sharegpt", sharegpt(*SAID))):
        assert read(format, {name: f" {json.dumps(value)}\n" for name, value in row.items()}) == read(format, row)
    assert read("messages", {"messages": "[]"}) == read("messages", {"messages": " "}) == []
    for text, reason in (
        ("[{'role': 'user'}]", "expected JSON in the field messages, found .*double quotes"),
        ('{"role": "user"}', "expected a list in the field messages, found an object"),
        ("user: hi", "expected a list in the field messages, found text"),
        ('["hi"]', "expected objects in the list messages, found text"),
        ('[{"role": "user", "role": "assistant", "content": ""}]', "the key 'role' stands twice in one object"),
        ("[" * 100_000, "nested too deeply"),
    ):
        with pytest.raises(InputError, match=f"f, line 1: .*{reason}"):
            read("messages", {"messages": text})


def test_a_system_message_beside_the_turns():
    turn = {"role": "system", "content": "S"}
    rows = [
        sharegpt("Q", "A") | {"system": "S"},
        sharegpt("Q", "A") | {"system_prompt": "S", "system": None, "system_message": ""},
        {"conversations": [turn, *sharegpt("Q", "A")["conversations"]], "system": "S "},
        {"conversations": [turn, *sharegpt("Q", "A")["conversations"]], "system": " "},
    ]
    assert [text.source for text in texts("sharegpt", *rows)] == ["S\n"] * 4
    assert [chat.messages for chat in chats("sharegpt", *rows)] == [[turn, *openai("Q", "A")["messages"]]] * 4
    other = rows[3] | {"system": "T"}
    with pytest.raises(InputError, match="the field system and the system turn in conversations say different things"):
        chats("sharegpt", other)
    with pytest.raises(InputError, match="the fields system and system_prompt say different things"):
        chats("messages", openai("Q", "A") | {"system": "S", "system_prompt": "T"})
    with pytest.raises(InputError, match="expected text in the field system, found a list"):
        texts("messages", openai("Q", "A") | {"system": ["S"]})
    assert chats("sharegpt", {"conversations": [], "system": "S"}) == []


ADD = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "turns",
    [
        [
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "3"},
        ],
        [
            {"role": "assistant", "tool_calls": [{"type": "function", "function": ADD}], "function_call": None},
            {"role": "tool", "name": "add", "content": "3"},
        ],
        [
            {"from": "function_call", "value": json.dumps(ADD)},
            {"from": "observation", "name": "add", "value": "3"},
        ],
        [
            {"from": "function_call", "value": json.dumps([ADD])},
            {"role": "tool", "name": "add", "content": [{"type": "text", "text": "3"}]},
        ],
    ],
)
def test_calls_of_tools_in_every_form(turns):
    rest = openai("Q", "So 3.")["messages"]
    (chat,) = chats("messages", {"messages": [rest[0], *turns, rest[1]]})
    call = {"type": "function", "function": ADD}
    assert chat.messages[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add"},
    ]
    with pytest.raises(InputError, match="are written by chat templates alone. Set data.template=chat"):
        texts("messages", {"messages": [rest[0], *turns, rest[1]]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"function_call": {"name": "f", "arguments": "{"}}, "expected JSON in the field function_call, found '{'"),
        ({"function_call": "add"}, "expected JSON in the field function_call, found 'add'"),
        ({"function_call": {"arguments": {}}}, "expected calls with the name of a function in function_call"),
        ({"tool_calls": [{"id": "1"}]}, "expected calls with the name of a function in tool_calls, found"),
        ({"tool_calls": [{"function": ADD}], "function_call": ADD}, "both tool_calls and function_call are given"),
        ({"function_call": {"name": "\ud83d"}}, "half a surrogate pair in the field function_call"),
        ({"content": None}, "expected text in the field content, found null"),
        ({"content": "", "refusal": "No."}, "the field refusal .a part of the answer. holds text, and a chat has no"),
        ({"content": "", "images": ["a.png"]}, "the field images .what no text model sees. holds a list"),
        ({"content": [{"type": "image"}]}, "expected content parts of type \"text\", found 'image'"),
        ({"content": "", "thinking": "a", "reasoning": "b"}, "the field reasoning and another of .* say different"),
    ],
)
def test_answers_that_cannot_be_read(row, reason):
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"} | row]}
    if "content" not in row["messages"][1]:
        row["messages"][1]["content"] = None
    with pytest.raises(InputError, match=f"f, line 1: .*{reason}"):
        chats("messages", row)


def test_a_call_without_arguments():
    call = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": " "}}
    (chat,) = chats("messages", {"messages": [{"role": "user", "content": "Q"}, call]})
    assert chat.messages[-1]["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_reasoning_under_other_names():
    for name in ("reasoning_content", "thinking", "reasoning"):
        row = openai("Q", "A", turn_1={name: "hm"})
        assert chats("messages", row)[0].messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "hm"}
        with pytest.raises(InputError, match=f"the field {name} .a part of the answer. holds text, and the pape"):
            texts("messages", row)
        assert texts("messages", openai("Q", "A", turn_1={name: None})) == texts("messages", openai("Q", "A"))


def test_tools_of_a_row():
    tool = {"name": "add", "parameters": {}}
    wrapped = [{"type": "function", "function": tool}]
    for more, tools in (
        ({"tools": wrapped}, wrapped),
        ({"tools": json.dumps([tool])}, [tool]),
        ({"functions": [tool], "tools": None}, wrapped),
        ({"tools": "[]", "functions": []}, None),
        ({"tools": " "}, None),
    ):
        assert chats("sharegpt", sharegpt("Q", "A") | more)[0].tools == tools
    assert texts("sharegpt", sharegpt("Q", "A") | {"tools": "[]"})
    with pytest.raises(InputError, match="both tools and functions are given"):
        chats("sharegpt", sharegpt("Q", "A") | {"tools": wrapped, "functions": [tool]})
    with pytest.raises(InputError, match="half a surrogate pair in the field tools"):
        chats("sharegpt", sharegpt("Q", "A") | {"tools": [{"name": "\udc00"}]})
