"""Rows of every format, right and wrong; a wrong one names file, line, field, and what was there instead."""

import json

import pytest

from qlora_jax.data.formats import FORMATS, format_rows
from qlora_jax.data.prompts import alpaca_prompt
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError


def formatted(format, *rows):
    texts, left_out = format_rows([Row("f", number, fields) for number, fields in enumerate(rows, 1)], format)
    return [(text.source, text.target) for text in texts], left_out


def message(role, text, *replies, **fields):
    return {"role": role, "text": text, "replies": list(replies), **fields}


def test_alpaca():
    rows = [
        {"instruction": "I", "input": "X", "output": "O"},
        {"instruction": "I", "input": "", "output": "O"},
        {"instruction": "I", "input": None, "output": "O", "text": 3},
        {"instruction": "I", "output": " O\n"},
    ]
    plain = alpaca_prompt("I")
    assert formatted("alpaca", *rows) == (
        [(alpaca_prompt("I", "X"), "O"), (plain, "O"), (plain, "O"), (plain, " O\n")],
        0,
    )


def test_input_output():
    assert formatted("input-output", {"input": "Q: ", "output": "A"}, {"input": "", "output": "B"}) == (
        [("Q: ", "A"), ("", "B")],
        0,
    )


def test_the_best_ranked_path_of_a_tree():
    tree = message(
        "prompter",
        "Q",
        message("assistant", "second", rank=1),
        message("assistant", "unranked"),
        message(
            "assistant",
            "best",
            message("prompter", "first follow-up", message("assistant", "A", rank=None), message("assistant", "B")),
            message("prompter", "second follow-up", message("assistant", "C", rank=0)),
            rank=0,
        ),
        message("assistant", "withdrawn", rank=-1, deleted=True),
    )
    expected = "### Human: Q\n### Assistant: best\n### Human: first follow-up\n### Assistant: A"
    assert formatted("oasst1", {"prompt": tree}) == ([("", expected)], 0)


def test_a_path_ends_with_the_assistant():
    asked_again = message("prompter", "Q", message("assistant", "A", message("prompter", "and?", rank=0), rank=0))
    unanswered = {"prompt": {"role": "prompter", "text": "Q", "replies": []}}
    assert formatted("oasst1", {"prompt": asked_again}, unanswered) == ([("", "### Human: Q\n### Assistant: A")], 1)


def test_flattened_conversations():
    rows = [
        {"text": "### Human: Q### Assistant: A\n\nB### Human: more"},
        {"text": "### Human: Q\n### Assistant: A"},
        {"text": "### Human: only a question"},
    ]
    assert formatted("oasst1", *rows) == (
        [("", "### Human: Q\n### Assistant: A\n\nB"), ("", "### Human: Q\n### Assistant: A")],
        1,
    )


@pytest.mark.parametrize(
    ("format", "fields", "reason"),
    [
        ("alpaca", {"prompt": "x", "completion": "y"}, 'no field "instruction"; fields found: prompt, completion'),
        ("alpaca", {"instruction": "I", "input": ""}, 'no field "output"; fields found: instruction, input'),
        ("alpaca", {"instruction": "I", "output": ["O"]}, "expected text in the field output, found a list"),
        ("alpaca", {"instruction": "I", "output": None}, "expected text in the field output, found null"),
        ("alpaca", {"instruction": "I", "input": 3, "output": "O"}, "expected text in the field input, found a number"),
        ("alpaca", {"instruction": "", "output": "O"}, "the field instruction is empty"),
        ("input-output", {"output": "O"}, 'no field "input"; fields found: output'),
        ("input-output", {"input": "I", "output": "\ud83d"}, "half a surrogate pair (U+D83D) in the field output"),
        ("input-output", {"a long\n" + "x" * 50: ""}, 'no field "input"; fields found: a long ' + "x" * 33),
        ("input-output", {}, 'no field "input"; fields found: none'),
        ("oasst1", {"instruction": "I"}, 'no field "prompt" (a tree) or "text" (a flattened conversation)'),
        ("oasst1", {"message_id": "1", "parent_id": None}, 'no field "role"; fields found: message_id, parent_id'),
        ("oasst1", {"prompt": "Q"}, "expected messages as objects in the tree, found text"),
        ("oasst1", {"prompt": {"text": "Q"}}, 'no field "role"; fields found: text'),
        ("oasst1", {"prompt": message("system", "Q")}, "expected prompter or assistant in the field role"),
        ("oasst1", {"prompt": {"role": "prompter", "text": "Q", "replies": {}}, "x": 1}, None),
        ("oasst1", {"prompt": {"role": "prompter", "text": "Q", "replies": "A"}}, "expected a list in the field"),
        ("oasst1", {"prompt": message("prompter", "Q", message("assistant", "A", rank="0"))}, "expected a number"),
        ("oasst1", {"text": "Human: Q"}, 'expected text that begins with "### Human:"'),
    ],
)
def test_bad_rows(format, fields, reason):
    if reason is None:  # an empty object for no replies
        assert formatted(format, fields) == ([], 1)
        return
    with pytest.raises(InputError) as caught:
        formatted(format, fields)
    assert str(caught.value).startswith("f, line 1: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_bad_row_is_named_and_the_others_counted():
    good = {"input": "I", "output": "O"}
    with pytest.raises(InputError, match=r"^f, line 2: .*\(and 2 more bad rows in this data set\)$"):
        formatted("input-output", good, {}, good, {"input": 1}, {})


def test_unknown_format():
    with pytest.raises(InputError, match="unknown data.format 'alpacca'; known formats: alpaca, input-output, oasst1"):
        formatted("alpacca")


def test_real_alpaca(shared_data):
    for name in ("alpaca_small.json", "alpaca_en_demo.json"):
        path = shared_data / "alpaca" / name
        texts, left_out = format_rows(read_rows(str(path)), "alpaca")
        rows = json.loads(path.read_text(encoding="utf-8"))
        assert left_out == 0 and [text.target for text in texts] == [row["output"] for row in rows]
        assert all(("### Input:" in text.source) == bool(row["input"]) for text, row in zip(texts, rows, strict=True))


def test_real_trees(shared_data):
    path = shared_data / "oasst1" / "en_100_tree.jsonl"
    texts, left_out = format_rows(read_rows(str(path)), "oasst1")
    assert (len(texts), left_out) == (100, 0)
    for line, text in zip(path.read_text(encoding="utf-8").splitlines(), texts, strict=True):
        root = json.loads(line)["prompt"]
        ranked = {reply["rank"]: reply["text"] for reply in root["replies"] if reply.get("rank") is not None}
        best = ranked[min(ranked)] if ranked else root["replies"][0]["text"]
        opening = f"### Human: {root['text'].strip()}\n### Assistant: {best.strip()}"
        assert text.source == "" and text.target.startswith(opening)
        assert text.target.rfind("\n### Assistant: ") > text.target.rfind("\n### Human: ")


def test_registry_names():
    assert set(FORMATS) >= {"alpaca", "input-output", "oasst1"}
