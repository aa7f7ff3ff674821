"""Instruction sets: the owners' rows, letter by letter, and the rows that are not theirs."""

import gzip

import pytest

from qlora_jax.data.formats import COLUMNS, FORMATS, format_rows
from qlora_jax.data.prompts import alpaca_prompt
from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError


def formatted(format, *rows):
    texts, left_out = format_rows([Row("f", number, fields) for number, fields in enumerate(rows, 1)], format)
    return [(text.source, text.target) for text in texts], left_out


def test_self_instruct():
    rows = [
        {"prompt": "Sum 1 2\n", "completion": "3<|endoftext|>"},
        {"prompt": "P", "instruction": "I", "input": "", "response": "a model's", "target": "T"},
        {"instruction": "Sum. ", "instances": [{"input": " 1 2\n", "output": "3"}, {"input": "", "output": "?"}]},
        {"instruction": "Sum.", "instances": []},
    ]
    assert formatted("self-instruct", *rows) == (
        [
            ("Sum 1 2\n", "3"),
            ("P", "T"),
            ("Sum.\n\nInput: 1 2\nOutput: ", "3"),
            ("Sum.\nOutput: ", "?"),
        ],
        1,
    )


def test_unnatural_instructions():
    def instance(text, output, **more):
        return {"input": "x", "instruction_with_input": text, "output": output, **more}

    core = {
        "instruction": "Sort {x}.",
        "instances": [
            instance("Sort b a.", "a b", constraints="None."),
            instance("Sort d c.", "c d", constraints="The output is a list."),
        ],
    }
    full = {**core, "instances": [], "reformulations": [instance("Order b a.", "a b")]}
    assert formatted("unnatural-instructions", core, full) == (
        [
            ("Sort b a.\n", "a b"),
            ("Sort d c.\nThe output is a list.\n", "c d"),
            ("Order b a.\n", "a b"),
        ],
        0,
    )


def test_flan_v2():
    rows = [
        {"question": r'"1 + 1?\nOptions:\n(A) 2', "answer": "(A)", "rationale": r"1 + 1 = 2\nSo 2."},
        {"inputs": "Q ", "targets": "A", "task": "t"},
    ]
    assert formatted("flan-v2", *rows) == (
        [
            (
                "\"1 + 1?\nOptions:\n(A) 2 Let's think first. Chain of thought: ",
                "1 + 1 = 2\nSo 2.\nTherefore, the answer is (A).",
            ),
            ("Q ", "A"),
        ],
        0,
    )


def test_dolly_chip2_and_longform():
    rows = [
        {"instruction": "I", "context": "C", "response": "R", "category": "c"},
        {"instruction": "I", "context": "", "response": "R"},
        {"prompt": "### Response:", "answer": "R"},
    ]
    assert formatted("dolly", *rows) == (
        [(alpaca_prompt("I", "C"), "R"), (alpaca_prompt("I"), "R"), ("### Response:", "R")],
        0,
    )
    pair = {"text": "<human>: Q\nmore\n<bot>: A", "metadata": "m"}
    assert formatted("chip2", pair, {"text": "<human>: Q\n<bot>: "}) == ([("Q\nmore", "A")], 1)
    assert formatted("longform", {"input": "Q", "output": "A", "source": "s"}) == ([("Q", "A")], 0)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_a_row_with_a_blank_answer_has_nothing_to_learn(answer):
    """Alpaca's own file has such rows."""
    instance = {"instruction_with_input": "I", "output": answer}
    rows = {
        "alpaca": {"instruction": "I", "output": answer},
        "input-output": {"input": "I", "output": answer},
        "self-instruct": {"prompt": "P", "completion": f"{answer}<|endoftext|>"},
        "unnatural-instructions": {"instruction": "I", "instances": [instance]},
        "flan-v2": {"inputs": "I", "targets": answer},
        "dolly": {"instruction": "I", "response": answer},
        "chip2": {"text": f"<human>: Q\n<bot>: {answer}"},
    }
    for format, row in rows.items():
        assert formatted(format, row) == ([], 1), format
    tasks = {"instruction": "I", "instances": [{"output": answer}, {"output": "O"}]}
    assert formatted("self-instruct", tasks) == ([("I\nOutput: ", "O")], 0)


@pytest.mark.parametrize(
    ("format", "fields", "reason"),
    [
        ("self-instruct", {"instruction": "I"}, 'no field "prompt" (with completion) or "instances"'),
        ("self-instruct", {"prompt": "P"}, 'no field "completion"; fields found: prompt'),
        ("self-instruct", {"instruction": "I", "instances": "x"}, "expected a list in the field instances, found text"),
        ("self-instruct", {"instruction": "I", "instances": ["x"]}, "expected objects in the list instances, found te"),
        (
            "self-instruct",
            {"instruction": "I", "instances": [{"input": "x"}]},
            'no field "output"; fields found: input',
        ),
        ("unnatural-instructions", {"instruction": "I", "output": "O"}, 'no field "instances"'),
        ("unnatural-instructions", {"instruction": "I", "instances": [{"output": "O"}]}, '"instruction_with_input"'),
        ("flan-v2", {"question": "Q", "answer": "", "rationale": "R"}, "the field answer is empty"),
        ("flan-v2", {"x": "Q"}, 'no field "question" (chain of thought) or "inputs" (the collection)'),
        ("dolly", {"instruction": "I", "output": "O"}, 'no field "response"; fields found: instruction, output'),
        ("chip2", {"text": "Q A"}, 'expected text as "<human>: question'),
        ("chip2", {"text": "<human>: a\n<bot>: b\n<human>: c\n<bot>: d"}, "found a longer conversation"),
    ],
)
def test_bad_rows(format, fields, reason):
    with pytest.raises(InputError) as caught:
        formatted(format, fields)
    assert str(caught.value).startswith("f, line 1: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_formats_that_fit_are_named():
    with pytest.raises(InputError, match=r'no field "instruction".*; data\.format=messages reads it \(and 1 more bad'):
        formatted("alpaca", *[{"messages": [{"role": "assistant", "content": "Hi"}]}] * 2)
    with pytest.raises(InputError, match=r"fields found: x$"):
        formatted("alpaca", {"x": 1})


def test_tsv_without_header_or_quoting(tmp_path):
    path = tmp_path / "cot.tsv.gz"
    path.write_bytes(gzip.compress(b'"Q"?\tyes\t"one\n\nQ2\tno\tR\r\n', mtime=0))
    rows = read_rows(str(path), columns=COLUMNS["flan-v2"])
    assert [(row.number, list(row.fields.values())) for row in rows] == [
        (1, ['"Q"?', "yes", '"one']),
        (3, ["Q2", "no", "R"]),
    ]
    path = tmp_path / "bad.tsv"
    path.write_text("Q\tA\tR\nQ\tA\n\nQ\n")
    with pytest.raises(InputError, match=r"bad.tsv, line 2: 2 fields between tabs, expected 3: question, answer, rat"):
        read_rows(str(path), columns=COLUMNS["flan-v2"])


@pytest.mark.parametrize(
    ("file", "format", "rows", "examples", "left_out"),
    [
        ("self_instruct/seed_tasks.jsonl", "self-instruct", 175, 175, 0),
        ("self_instruct/user_oriented_instructions.jsonl", "self-instruct", 252, 252, 0),
        ("self_instruct/davinci-self-instruct_predictions.jsonl", "self-instruct", 252, 252, 0),
        ("self_instruct/t0_quoref_Answer_Test.jsonl", "self-instruct", 200, 200, 0),
        ("self_instruct/t0_xsum_summarize_DOC.jsonl", "self-instruct", 200, 200, 0),
        ("flan_v2/aqua_train.tsv", "flan-v2", 2728, 2728, 0),
        ("flan_v2/gsm8k_train.tsv", "flan-v2", 7473, 7473, 0),
        ("flan_v2/strategyqa_train.tsv", "flan-v2", 2061, 2061, 0),
        ("dolly/dolly_prompted_subset.jsonl", "dolly", 151, 151, 0),
        ("alpaca/alpaca_small.json", "alpaca", 2000, 2000, 0),
        ("alpaca/alpaca_en_demo.json", "alpaca", 999, 999, 0),
        ("oasst1/en_100_tree.jsonl", "oasst1", 100, 100, 0),
        ("oasst1/en_100_message.jsonl", "oasst1", 100, 100, 0),
        ("oasst1/realistic_seed_data.json", "oasst1", 444, 74, 0),  # single messages of 74 trees
        ("hh_rlhf/harmless-base/test.jsonl.gz", "hh-rlhf", 2312, 2309, 3),  # three whose only answer is blank
    ],
)
def test_real_files(shared_data, file, format, rows, examples, left_out):
    read = read_rows(str(shared_data / file), columns=COLUMNS.get(format, ()))
    texts, without = format_rows(read, format)
    assert (len(read), len(texts), without) == (rows, examples, left_out)


def test_real_self_instruct_prompts_are_ours(shared_data):
    folder = shared_data / "self_instruct"
    prompts = [row.fields["prompt"] for row in read_rows(str(folder / "davinci-self-instruct_predictions.jsonl"))]
    texts, _ = format_rows(read_rows(str(folder / "user_oriented_instructions.jsonl")), "self-instruct")
    assert sum(text.source == f"{prompt} " for text, prompt in zip(texts, prompts, strict=True)) == len(prompts)


def test_every_format_is_in_the_config_that_lists_them():
    from qlora_jax.config_file import REPOSITORY

    comment = (REPOSITORY / "qlora_jax" / "base.py").read_text()
    assert [name for name in FORMATS if name not in comment] == []
