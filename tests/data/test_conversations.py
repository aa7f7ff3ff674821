"""Conversations: which turns are kept, which form they take, and what is refused."""

import pytest

from qlora_jax.data.formats import format_rows
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError


def formatted(format, *rows):
    texts, left_out = format_rows([Row("f", number, fields) for number, fields in enumerate(rows, 1)], format)
    return [(text.source, text.target) for text in texts], left_out


def test_hh_rlhf_takes_the_chosen_conversation_to_its_last_answer():
    talk = "\n\nHuman: Q \n\nAssistant: A\n\nmore"
    rows = [
        {"chosen": talk, "rejected": "\n\nHuman: Q \n\nAssistant: worse"},
        {"chosen": f"{talk}\n\nHuman: why?\n\nAssistant: "},
        {"chosen": "\n\nHuman: Q\n\nAssistant: "},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: x\n\nHuman: y\n\nAssistant: B"},
    ]
    assert formatted("hh-rlhf", *rows) == ([("", talk), ("", talk), ("", rows[3]["chosen"])], 1)


def test_messages():
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief. "},
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": "bye"},
            ]
        },
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": []},
    ]
    assert formatted("messages", *rows) == ([("Be brief.\n", "### Human: Q?\n### Assistant: A")], 2)


def test_sharegpt():
    rows = [
        {"id": "1", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Q"}]},
        {"conversations": None},
    ]
    assert formatted("sharegpt", *rows) == (
        [("", "### Human: Q\n### Assistant: A"), ("", "### Assistant: Hello.")],
        1,
    )


def test_single_messages_become_trees():
    def message(name, parent, role, text, **more):
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, **more}

    rows = [
        message("c", "b", "prompter", "and?"),
        message("b2", "a", "assistant", "worse", rank=1),
        message("b", "a", "assistant", "better", rank=0),
        message("a", None, "prompter", "Q"),
        message("d", "c", "assistant", "B"),
        message("z", None, "prompter", "unanswered"),
    ]
    expected = "### Human: Q\n### Assistant: better\n### Human: and?\n### Assistant: B"
    assert formatted("oasst1", *rows) == ([("", expected)], 1)
    with pytest.raises(InputError, match="f, line 2: its parent 'a' is not in this data set"):
        formatted("oasst1", rows[3] | {"message_id": "A"}, rows[1])
    with pytest.raises(InputError, match="f, line 2: the message 'b' answers itself, by way of its parents"):
        formatted("oasst1", rows[3], message("b", "c", "prompter", "x"), message("c", "b", "assistant", "y"))
    with pytest.raises(InputError, match="f, line 2: a second message with the message_id 'a'"):
        formatted("oasst1", rows[3], rows[3])


@pytest.mark.parametrize(
    ("format", "fields", "reason"),
    [
        ("hh-rlhf", {"text": "x"}, 'no field "chosen"; fields found: text'),
        ("hh-rlhf", {"chosen": "Human: Q"}, "expected text that begins with"),
        ("messages", {"conversations": []}, 'no field "messages"; fields found: conversations'),
        ("messages", {"messages": {}}, None),
        ("messages", {"messages": "x"}, "expected a list in the field messages, found text"),
        (
            "messages",
            {"messages": [{"role": "tool", "content": "x"}]},
            "has no place for a turn of the role tool: tools are written by chat templates alone. Set data.temp",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "expected text in the field content, found null",
        ),
        ("messages", {"messages": [{"role": "user"}]}, 'no field "content"; fields found: role'),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image_url"}]}]},
            "part 2 of 2 in the field content: expected content parts of type \"text\", found 'image_url'",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Q"}, {"role": "system", "content": "S"}]},
            "a system turn that is not the first in messages",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "bot", "value": "x"}]},
            "expected system, developer, user, human, assistant, gpt or chatgpt in the field from, found 'bot'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": 1}]},
            "expected text in the field value, found a number",
        ),
    ],
)
def test_bad_rows(format, fields, reason):
    if reason is None:  # an empty object for no turns
        assert formatted(format, fields) == ([], 1)
        return
    with pytest.raises(InputError) as caught:
        formatted(format, fields)
    assert str(caught.value).startswith("f, line 1: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_real_hh_rlhf(shared_data):
    rows = read_rows(str(shared_data / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"))
    texts, _ = format_rows(rows, "hh-rlhf")
    by_place = {row.where: row.fields["chosen"] for row in rows}
    assert sum(text.target == by_place[text.where] for text in texts) == 2308  # one is cut to its last answer
    assert all(by_place[text.where].startswith(text.target) for text in texts)


def test_real_trees_and_their_root_messages_agree(shared_data):
    trees, roots = (
        format_rows(read_rows(str(shared_data / "oasst1" / f"en_100_{kind}.jsonl")), "oasst1")[0]
        for kind in ("tree", "message")
    )
    assert sum(a.target == b.target for a, b in zip(trees, roots, strict=True)) == 100
