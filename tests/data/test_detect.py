"""Which format a data set has, found from its rows alone."""

import json

import pytest

from qlora_jax.data.detect import find_format
from qlora_jax.data.formats import FORMATS
from qlora_jax.errors import InputError

HELLO = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
TOOL = [HELLO[0], CALL, {"role": "tool", "content": "3"}, HELLO[1]]
ROWS = {
    "alpaca": [{"instruction": "I", "input": "", "output": "O", "text": "Below is an instruction ..."}],
    "input-output": [{"input": "I", "output": "O"}],
    "oasst1": [{"text": "### Human: Q### Assistant: A"}],
    "hh-rlhf": [{"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}],
    "self-instruct": [{"instruction": "I", "instances": [{"input": "X", "output": "O"}]}],
    "unnatural-instructions": [
        {"instruction": "I", "instances": [{"instruction_with_input": "I X", "input": "X", "output": "O"}]}
    ],
    "flan-v2": [{"inputs": "I", "targets": "O"}],
    "chip2": [{"text": "<human>: Q\n<bot>: A"}],
    "dolly": [{"instruction": "I", "context": "", "response": "R", "category": "qa"}],
    "messages": [{"messages": HELLO, "prompt": "Q"}, {"messages": TOOL, "tools": []}],
    "prompt-completion": [{"prompt": "P", "completion": "C"}, {"prompt": HELLO[:1], "completion": HELLO[1:]}],
    "preference": [{"prompt": "Q", "chosen": HELLO, "rejected": HELLO, "messages": HELLO, "score_chosen": 8.0}],
    "super-natural-instructions": [{"definition": "D", "inputs": "Q", "targets": "A", "task_name": "t"}],
    "text": [{"text": "Once upon a time"}, {"text": "### Human: Q"}, {"text": "the end"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}],
}


def write(tmp_path, rows, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_every_format_is_found_but_for_other_names_of_one():
    assert {*ROWS, "longform"} == FORMATS.keys()


@pytest.mark.parametrize("format", ROWS)
def test_the_format_of_rows(tmp_path, format):
    assert find_format(write(tmp_path, ROWS[format])) == format


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "P", "chosen": "C", "rejected": "R"}, "preference"),
        ({"chosen": HELLO, "rejected": HELLO}, "preference"),
        ({"prompt": "P", "completion": "C", "label": True}, "prompt-completion"),
        ({"prompt": "P", "target": "T"}, "self-instruct"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]}, "messages"),
    ],
)
def test_rows_like_those_of_other_formats(tmp_path, row, format):
    assert find_format(write(tmp_path, [row])) == format


def test_several_data_sets(tmp_path):
    one, other = (write(tmp_path, ROWS[name], f"{name}.jsonl") for name in ("alpaca", "messages"))
    assert find_format(f"{one},{other}") == "alpaca,messages"
    assert find_format([one, one]) == "alpaca"
    both = tmp_path / "a,b.jsonl"  # a file's own comma
    both.write_text(json.dumps(ROWS["dolly"][0]))
    assert find_format(str(both)) == "dolly"
    for paths in (f"{one},", f",{one}"):
        with pytest.raises(InputError, match="an empty name among the data sets"):
            find_format(paths)


def test_rows_without_an_answer_decide_nothing_alone(tmp_path):
    empty = {"instruction": "I", "output": " "}
    assert find_format(write(tmp_path, [empty, *ROWS["alpaca"]])) == "alpaca"
    assert find_format(write(tmp_path, [empty])) == "alpaca"


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "cot.tsv").write_text("Q\tA\tbecause\n" * 3)
    assert find_format(str(tmp_path / "cot.tsv")) == "flan-v2"
    (tmp_path / "rows.tsv").write_text("instruction\toutput\nI\tO\n")
    assert find_format(str(tmp_path / "rows.tsv")) == "alpaca"
    assert find_format("alpaca") == "alpaca"  # known by name: nothing is fetched


def test_single_messages_of_trees(tmp_path):
    rows = [
        {"message_id": "a", "parent_id": None, "text": "Q", "role": "prompter"},
        {"message_id": "b", "parent_id": "a", "text": "A", "role": "assistant"},
    ]
    assert find_format(write(tmp_path, rows)) == "oasst1"
    with pytest.raises(InputError, match="line 2: its parent 'c' is not in this data set"):
        find_format(write(tmp_path, [rows[0], rows[1] | {"parent_id": "c"}]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Q", "reply": "A"}], "rows.jsonl: no data.format reads its rows, whose fields are question, re"),
        ([{"instruction": "I", "output": "O"}, {"instruction": "I", "output": 3}],
         r"line 2: expected text in the field output, found a number \(data.format=alpaca reads the most"),
        ([{"instruction": "I", "output": "O", "response": "R"}], "more than one format .* to alpaca or dolly"),
        ([], "rows.jsonl is empty"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        find_format(write(tmp_path, rows))


def test_only_the_first_rows_are_read(tmp_path):
    file = write(tmp_path, ROWS["alpaca"] * 64)
    with open(file, "a") as more:
        more.write("{\n")
    assert find_format(file) == "alpaca"


def test_real_data(shared_data):
    found = {
        "alpaca/alpaca_small.json": "alpaca",
        "dolly/dolly_prompted_subset.jsonl": "dolly",
        "flan_v2/gsm8k_train.tsv": "flan-v2",
        "hh_rlhf/harmless-base/test.jsonl.gz": "hh-rlhf",
        "oasst1/en_100_message.jsonl": "oasst1",
        "oasst1/en_100_tree.jsonl": "oasst1",
        "self_instruct/seed_tasks.jsonl": "self-instruct",
    }
    assert {name: find_format(str(shared_data / name)) for name in found} == found
