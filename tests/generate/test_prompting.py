"""Templates give the ids that training gives, files of prompts are read or refused; answers end where they should."""

import json

import pytest

from qlora_jax.data.examples import tokenize_example
from qlora_jax.data.prompts import GUANACO_SYSTEM, alpaca_prompt
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Answer, Request, answer_text, prompt_ids, read_requests


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer.from_folder(golden / "tokenizer")


def test_plain_is_bos_and_the_text(tokenizer) -> None:
    assert prompt_ids(tokenizer, "plain", Request("")) == [1]
    assert prompt_ids(tokenizer, "plain", Request("Hello")) == tokenizer.encode("Hello", bos=True)


def test_alpaca_is_what_training_gives(tokenizer) -> None:
    for given in ("", "a, b"):
        example = tokenize_example(alpaca_prompt("Sort.", given), "x", tokenizer, 1000, 100)
        source = example.tokens[: int(example.loss_mask.argmax())].tolist()
        assert prompt_ids(tokenizer, "alpaca", Request("Sort.", given)) == source


def test_guanaco_shows_what_was_said(tokenizer) -> None:
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = f"{GUANACO_SYSTEM}\n### Human: Hi\n### Assistant: Hello\n### Human: Why?\n\nsky\n### Assistant:"
    assert prompt_ids(tokenizer, "guanaco", Request("Why?", "sky"), before) == tokenizer.encode(text, bos=True)


def test_chat_needs_a_template(tokenizer) -> None:
    with pytest.raises(InputError, match="no chat template"):
        prompt_ids(tokenizer, "chat", Request("Hi"))
    with pytest.raises(InputError, match="unknown template 'vicuna'; known: plain, alpaca, guanaco, chat"):
        prompt_ids(tokenizer, "vicuna", Request("Hi"))


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("template", "generated", "shown"),
    [
        ("plain", "  a b \n", "  a b \n"),
        ("alpaca", "\n a  b \n\n", "a  b"),
        ("guanaco", " Yes.\n### Human: And?\n### Assistant: No", "Yes."),
        ("guanaco", " C# and ### Hu\n", "C# and ### Hu"),
        ("guanaco", "### Human:", ""),
        ("guanaco", "  \n", ""),
        ("alpaca", " a ### Human: b", "a ### Human: b"),
    ],
)
def test_answers(tokenizer, template, generated, shown, size) -> None:
    prompt = tokenizer.encode("x", bos=True)
    ids = tokenizer.encode("x" + generated)[len(prompt) - 1 :]
    answer = Answer(tokenizer, template, prompt)
    pieces = [answer.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(pieces) + answer.flush() == shown
    assert answer.stopped == (template == "guanaco" and "### Human:" in generated)
    assert answer_text(tokenizer, template, prompt, ids) == shown


def test_files_of_prompts(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffOne\r\n\n Two é\n".encode())
    assert read_requests(str(tmp_path / "a.txt")) == [Request("One"), Request(" Two é")]
    rows = [{"prompt": "P", "input": "unread"}, {"instruction": "I", "input": "x", "output": "o"}, {"instruction": "J"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_requests(str(tmp_path / "a.jsonl")) == [Request("P"), Request("I", "x", True), Request("J", "", True)]
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
            'line 2: no field "prompt" or "instruction"; fields found: text',
        ),
        ("a.jsonl", b'{"prompt": 3}\n', "line 1: the field prompt holds 3"),
        ("a.jsonl", b'{"instruction": " "}\n', "line 1: the field instruction is empty"),
        ("a.jsonl", b'{"instruction": "a", "input": ["b"]}\n', "line 1: the field input holds"),
        ("a.jsonl", None, "no such file"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_bad_files_of_prompts_are_named(tmp_path, name, content, named) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=named):
        read_requests(str(tmp_path / name))
