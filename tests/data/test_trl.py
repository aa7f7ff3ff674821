"""Rows as TRL takes them: prompts and completions, preferences, plain text."""

import pytest

from qlora_jax.errors import InputError
from tests.data.test_turns import chats, learned, texts

ASKED = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
FIRST = [*ASKED, {"role": "assistant", "content": "old"}, {"role": "user", "content": "more"}]
GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": "od"}]}]
CALLED = [
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "good"},
]


def said(chat):
    """Contents of a chat's turns, those that are learned in brackets."""
    turns = list(zip(chat.messages, chat.learn or [True] * len(chat.messages), strict=True))
    return [
        f"[{turn['content']}]" if learn and turn["role"] == "assistant" else turn["content"] for turn, learn in turns
    ]


def test_a_prompt_and_its_completion_as_text():
    rows = [{"prompt": "P: ", "completion": " C<|endoftext|>"}, {"prompt": "", "completion": "all"}]
    rows.append({"prompt": "P", "completion": " "})
    assert [(text.source, text.target) for text in texts("prompt-completion", *rows)] == [("P: ", " C"), ("", "all")]
    (chat,) = chats("prompt-completion", rows[0] | {"system": "S"})
    assert [turn["role"] for turn in chat.messages] == ["system", "user", "assistant"]
    assert said(chat) == ["S", "P: ", "[ C]"]
    with pytest.raises(InputError, match="the field prompt is empty"):  # no chat begins with an answer
        chats("prompt-completion", rows[1])
    for read in (texts, chats):
        with pytest.raises(InputError, match=r"line 1: the field label \(that this is no answer to learn\)"):
            read("prompt-completion", rows[0] | {"label": False})
        with pytest.raises(InputError, match=r"the field chat_template_kwargs \(settings of the chat template\)"):
            read("prompt-completion", rows[0] | {"chat_template_kwargs": {"enable_thinking": False}})


@pytest.mark.parametrize("answer", [GOOD, PARTS, "good"])
def test_of_messages_the_completion_alone_is_learned(answer):
    row = {"prompt": FIRST, "completion": answer}
    (chat,) = chats("prompt-completion", row)
    assert said(chat) == ["S", "Q", "old", "more", "[good]"]
    (text,) = texts("prompt-completion", row)
    assert text.source == "S\n"
    given = "[### Human: Q\n][### Assistant: old\n][### Human: more\n]"
    assert learned(text) == f"{given}### Assistant: good"
    marked = {"prompt": [*ASKED, FIRST[2] | {"weight": 1}, FIRST[3]], "completion": answer}
    assert chats("prompt-completion", marked)[0] == chat


def test_a_completion_of_several_turns():
    (chat,) = chats("prompt-completion", {"prompt": ASKED, "completion": CALLED, "tools": [{"name": "f"}]})
    assert said(chat) == ["S", "Q", "[]", "3", "[good]"] and chat.tools == [{"name": "f"}]
    with pytest.raises(InputError, match="has no place for tool_calls: tools are written by chat templates alone. Set"):
        texts("prompt-completion", {"prompt": ASKED, "completion": CALLED})
    with pytest.raises(InputError, match="the field completion begins with a system turn; put it at the head of the"):
        chats("prompt-completion", {"prompt": ASKED, "completion": [ASKED[0], *GOOD]})
    assert chats("prompt-completion", {"prompt": ASKED, "completion": []}) == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": FIRST, "chosen": GOOD, "rejected": BAD},
        {"chosen": [*FIRST, *GOOD], "rejected": [*FIRST, *BAD]},
        {"prompt": FIRST, "chosen": [*FIRST, *GOOD], "rejected": [*FIRST, *BAD]},
        {"prompt": FIRST[1:], "system": "S", "chosen": [*FIRST[1:], *GOOD], "rejected": []},
        {"system": "S", "chosen": [*FIRST[1:], *GOOD], "rejected": [*FIRST[1:], *BAD]},
    ],
)
def test_the_chosen_answer_is_learned(row):
    (chat,) = chats("preference", row)
    assert said(chat) == ["S", "Q", "old", "more", "[good]"]


def test_preferences_whose_prompt_is_text():
    question = {"role": "user", "content": "Q"}
    for row in (
        {"prompt": "Q", "chosen": [question, *GOOD], "rejected": [question, *BAD], "score_chosen": 8.0},
        {"prompt": "Q", "chosen": GOOD, "rejected": BAD},
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    ):
        assert said(chats("preference", row)[0]) == ["Q", "[good]"]
    longer = {"prompt": "Q", "chosen": [question, *BAD, {"role": "user", "content": "no"}, *GOOD], "rejected": []}
    assert said(chats("preference", longer)[0]) == ["Q", "[bad]", "no", "[good]"]
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
    assert [(text.source, text.target) for text in texts("preference", row)] == [("Q", "good")]


def test_equal_answers_are_one():
    (chat,) = chats("preference", {"chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *GOOD]})
    assert said(chat) == ["S", "Q", "[good]"]
    (alone,) = chats("preference", {"chosen": [*FIRST, *GOOD]})  # nothing says where the prompt ends
    assert said(alone) == ["S", "Q", "[old]", "more", "[good]"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "good", "rejected": "bad"}, "chosen is text and there is no prompt: .*; add a field prompt"),
        ({"prompt": "Q", "chosen": "\n\nHuman: Q\n\nAssistant: A"}, "which data.format=hh-rlhf reads"),
        ({"prompt": "other", "chosen": [*ASKED, *GOOD]}, "chosen begins with other turns than the prompt; leave out"),
        ({"prompt": FIRST, "chosen": [*ASKED, *GOOD]}, "chosen begins with other turns than the prompt"),
        ({"prompt": "Q", "rejected": "bad"}, 'no field "chosen"'),
        ({"prompt": "Q", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "part 1 of 1 in"),
    ],
)  # fmt: skip
def test_preferences_that_are_not_clear(row, message):
    for read in (texts, chats):
        with pytest.raises(InputError, match=f"^f, line 1: .*{message}"):
            read("preference", row)


def test_plain_text():
    (text,) = texts("text", {"text": " Once\n"}, {"text": " "})
    assert (text.source, text.target) == ("", " Once\n")
    with pytest.raises(InputError, match="plain text, which no chat template is for: set data.template=paper"):
        chats("text", {"text": "Once"})
