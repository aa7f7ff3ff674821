"""Files of prompts are read in every form they come in, or refused in one line that names the row."""

import json

import pytest

from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Request
from qlora_jax.generate.requests import read_requests


def read(tmp_path, *rows: dict) -> list[Request]:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_requests(str(tmp_path / "a.jsonl"))


def test_files_of_prompts(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\n\n Two é\n".encode())
    assert read_requests(str(tmp_path / "a.txt")) == [Request("One"), Request(" Two é")]
    rows = [{"prompt": "P", "input": "unread"}, {"instruction": "I", "input": "x", "output": "o"}, {"instruction": "J"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_requests(str(tmp_path / "a.jsonl")) == [
        Request("P"),
        Request("I", "x", "instruction"),
        Request("J", "", "instruction"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows[1:]))
    assert [request.message for request in read_requests(str(tmp_path / "a.json"))] == ["I\n\nx", "J"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.txt", b"\n\n", "has no prompt"),
        ("a.txt", b"ok\n\xff\n", "line 2: not UTF-8"),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"text": "b"}\n',
            'line 2: no field "prompt", "instruction", "messages" or "turns", nor .*; fields found: text',
        ),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1: expected text in the field prompt, found a number"),
        ("a.jsonl", b'{"instruction": " "}\n', "line 1: the field instruction is empty"),
        (
            "a.jsonl",
            b'{"instruction": "a", "input": ["b"]}\n',
            "line 1: expected text in the field input, found a list",
        ),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 1}\n{"prompt": ""}\n', "line 2: .*and 1 more bad row"),
        ("a.jsonl", b"", "empty .0 bytes."),
        ("a.jsonl", b'{"turns": ["a", "b"]}\n', "line 1: expected one question in the field turns, found 2"),
        ("a.jsonl", b'{"turns": "a"}\n', "expected a list of questions in the field turns, found text"),
        ("a.jsonl", b'{"turns": [3]}\n', "expected a list of questions"),
        ("a.jsonl", b'{"messages": []}\n', "ends with the user's turn"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "ends with the user's turn"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": " "}]}\n', "last turn in the field messages is empty"),
        ("a.jsonl", b'{"messages": [{"role": "tool", "content": "a"}]}\n', "in the field role, found 'tool'"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}\n',
            "a system turn that is not the first",
        ),
        ("a.jsonl", b'{"prompt": "a", "seed": 1.5}\n', "expected a whole number in the field seed"),
        ("a.jsonl", b'{"prompt": "a", "id": NaN}\n', "the field id holds what JSON has no form for: nan"),
        ("a.jsonl", b'{"prompt": "a", "lang": "\\ud800"}\n', "the field lang holds what JSON has no form for"),
        ("a.jsonl", b'{"prompt": "a", "seed": -1}\n', "line 1: the field seed is -1; expected 0 to 4294967295"),
        ("a.jsonl", None, "no such file"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_bad_files_of_prompts_are_named(tmp_path, name, content, named) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=named):
        read_requests(str(tmp_path / name))


def test_questions_of_benchmarks(tmp_path) -> None:
    vicuna, older, oa = read(
        tmp_path,
        {"question_id": 1, "category": "generic", "turns": ["How?"]},
        {"question_id": 2, "category": "math", "text": "How much?", "prompt": "A chat ... ### Human: How much?"},
        {
            "question_id": "x",
            "message_id": "x",
            "text": "### Human: Hi ### Assistant: Hello! ### Human: Why? ### Assistant:",
            "output": "unread",
        },
    )
    assert vicuna == Request("How?", form="question", kept={"question_id": 1, "category": "generic"})
    assert older == Request("How much?", form="question", kept={"question_id": 2, "category": "math"})
    before = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"})
    assert oa == Request("Why?", form="question", before=before, kept={"question_id": "x", "message_id": "x"})


def test_text_that_only_looks_like_turns_stays_as_it_is(tmp_path) -> None:
    for text in ("What does ### Human: mean?", "### Human: Hi ### Assistant: Hello", "### Human: Hi"):
        assert read(tmp_path, {"question_id": 1, "text": text})[0].text == text


def test_conversations_and_seeds(tmp_path) -> None:
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U", "name": "unread"}]
    (request,) = read(tmp_path, {"messages": turns, "seed": 7, "id": "a", "other": 1})
    assert (request.text, request.before, request.seed) == ("U", (turns[0],), 7)
    assert request.kept == {"id": "a"}
    (tmp_path / "a.csv").write_text("prompt,seed\na,12\nb,\n")
    assert [request.seed for request in read_requests(str(tmp_path / "a.csv"))] == [12, None]


def test_the_benchmarks_of_the_paper(shared_data) -> None:
    vicuna = read_requests(str(shared_data / "vicuna_bench" / "question.jsonl"))
    assert vicuna == [
        Request(request.text, form="question", kept=request.kept)
        for request in read_requests(str(shared_data / "oa_bench" / "vicuna_questions.jsonl"))
    ]
    assert [request.kept["question_id"] for request in vicuna] == list(range(1, 81))
    oa = read_requests(str(shared_data / "oa_bench" / "oa_questions.jsonl"))
    assert len(oa) == 953
    assert not any("### Human:" in turn["content"] for request in oa for turn in request.before)
    assert all(len(request.before) % 2 == 0 and "### Assistant:" not in request.text for request in oa)
