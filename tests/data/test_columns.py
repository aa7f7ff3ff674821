"""Columns that carry meaning are read or refused by name, whatever the format; the others are passed over."""

import pytest

from qlora_jax.data.formats import FORMATS, stream_chats, stream_texts
from qlora_jax.data.forms.columns import MEANING
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
ROWS = {
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "input-output": {"input": "Q", "output": "A"},
    "longform": {"input": "Q", "output": "A"},
    "oasst1": {"text": "### Human: Q### Assistant: A"},
    "hh-rlhf": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    "self-instruct": {"prompt": "Q", "completion": "A"},
    "unnatural-instructions": {
        "instruction": "Q",
        "instances": [{"instruction_with_input": "Q", "input": "I", "output": "A"}],
    },
    "flan-v2": {"inputs": "Q", "targets": "A"},
    "chip2": {"text": "<human>: Q\n<bot>: A"},
    "dolly": {"instruction": "Q", "context": "", "response": "A"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": TURNS},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
    "preference": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "super-natural-instructions": {"definition": "D", "inputs": "Q", "targets": "A"},
    "text": {"text": "A"},
}
FORMS = [(format, form) for format in FORMATS for form in ("paper", "chat") if (format, form) != ("text", "chat")]
# of formats and forms, what is read of MEANING besides what stands in ROWS
SYSTEM = {"system", "system_prompt", "system_message"}
READ = {
    ("messages", "paper"): SYSTEM,
    ("messages", "chat"): {*SYSTEM, "tools", "functions"},
    ("alpaca", "chat"): {*SYSTEM, "history"},
    ("prompt-completion", "chat"): {*SYSTEM, "tools", "functions"},
    ("preference", "chat"): {*SYSTEM, "tools", "functions"},
}
# copies of what is read
PASSED = {
    "oasst1": {"labels"},
    "self-instruct": {"instruction", "input"},
    "messages": {"instruction", "input", "context"},
}


def read(form, format, row):
    """What a row becomes, without its place; with an error, its text."""
    stream = stream_chats if form == "chat" else stream_texts
    try:
        (made,) = next(stream([Row("f", 1, row)], format))
    except InputError as error:
        return str(error)
    return (made.messages, made.tools) if form == "chat" else (made.source, made.target, made.given)


def value_of(name):
    return {"weight": 0, "train": False, "training": False, "loss": False, "label": False, "kto_tag": False}.get(
        name, [["q", "a"]] if name == "history" else [{"name": "f"}] if name in ("tools", "functions") else "something"
    )


@pytest.mark.parametrize(("format", "form"), FORMS)
def test_no_column_that_carries_meaning_is_dropped(format, form):
    row = ROWS[format]
    plain = read(form, format, row)
    assert isinstance(plain, tuple)
    like = "messages" if format == "sharegpt" else format
    by_chat = READ.get((like, "chat"), set() if format in ("oasst1", "hh-rlhf", "text") else SYSTEM)
    read_here = by_chat if form == "chat" else READ.get((like, "paper"), set())
    for name in sorted(MEANING.keys() - row.keys() - PASSED.get(like, set())):
        made = read(form, format, row | {name: value_of(name)})
        if name in read_here:
            assert isinstance(made, tuple) and made != plain, name
        elif name in FORMATS[format].reads:
            assert isinstance(made, tuple)  # a column of another shape of such rows
        else:
            assert isinstance(made, str) and made.startswith(f"f, line 1: the field {name} ("), (name, made)
            assert ("set data.template=chat" in made) == (name in by_chat)
    for name in PASSED.get(like, ()):
        assert read(form, format, row | {name: "something"}) == plain


@pytest.mark.parametrize(("format", "form"), FORMS)
def test_what_says_nothing_and_what_has_no_meaning_is_passed_over(format, form):
    row = ROWS[format]
    plain = read(form, format, row)
    for value in (None, "", " ", [], {}):
        assert read(form, format, row | dict.fromkeys(MEANING.keys() - row.keys(), value)) == plain
    said = {"id": 7, "source": "web", "metadata": {"a": 1}, "score": 0.5, "loss": 1.25, "label": 1, "tags": ["a"]}
    neutral = {"weight": 1, "train": True, "kto_tag": True, "tools": "[]", "history": "[]"}
    assert read(form, format, row | said | neutral) == plain


def test_alpacas_history_and_system_in_a_chat():
    row = ROWS["alpaca"] | {"input": "I", "system": "S", "history": [["q", "a"], ["r", "b"]]}
    said = ["S", "q", "a", "r", "b", "Q\n\nI", "A"]
    assert [turn["content"] for turn in read("chat", "alpaca", row)[0]] == said
    roles = ["system", *["user", "assistant"] * 3]
    assert [turn["role"] for turn in read("chat", "alpaca", row)[0]] == roles
    assert read("chat", "alpaca", row | {"history": '[["q", "a"], ["r", "b"]]'}) == read("chat", "alpaca", row)
    for history in (["q", "a"], [["q"]], [["q", 1]], [{"user": "q"}], "q"):
        assert "in the field history, found" in read("chat", "alpaca", row | {"history": history})
    assert read("paper", "alpaca", row) == (
        "f, line 1: the field system (a system message) holds text, and the paper's form of this format has no place "
        "for it; set data.template=chat, which reads it, or take it out where it does not matter"
    )


def test_an_error_of_the_rows_form_comes_first():
    made = read("paper", "alpaca", {"messages": TURNS, "system": "S"})
    assert made == 'f, line 1: no field "instruction"; fields found: messages, system; data.format=messages reads it'


@pytest.mark.parametrize(
    ("format", "row", "hint"),
    [
        # a format that would leave out what the row says is not the way out
        ("alpaca", {"instruction": b"Q", "input": "I", "output": "A"}, None),
        ("oasst1", {"instruction": b"Q", "input": "I", "output": "A"}, None),
        ("dolly", {"instruction": "Q", "input": "I", "output": "A"}, "alpaca"),
        ("oasst1", {"instruction": "Q", "input": "I", "output": "A"}, "alpaca"),
        ("dolly", {"input": "I", "output": "A"}, "input-output"),
        ("alpaca", {"instruction": "Q", "context": "C", "response": "A"}, "dolly"),
        ("messages", {"conversations": TURNS, "system": "S"}, "sharegpt"),
        ("messages", {"conversations": TURNS, "images": ["a.png"]}, None),
        ("self-instruct", {"inputs": "Q", "targets": "A"}, "flan-v2"),
    ],
)
def test_the_format_that_an_error_recommends(format, row, hint):
    made = read("paper", format, row)
    assert isinstance(made, str)
    assert made.partition("; data.format=")[2] == ("" if hint is None else f"{hint} reads it")


def test_bytes_are_named_with_the_way_out():
    made = read("paper", "alpaca", {"instruction": b"Q", "input": "I", "output": "A"})
    assert made == (
        "f, line 1: expected text in the field instruction, found bytes, as a binary column has them: write the column "
        'as text (pyarrow: column.cast("string"))'
    )
