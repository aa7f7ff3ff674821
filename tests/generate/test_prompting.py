"""Templates give the ids that training gives, files of prompts are read or refused; answers end where they should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.examples import tokenize_example
from qlora_jax.data.prompts import GUANACO_SYSTEM, alpaca_prompt
from qlora_jax.errors import InputError
from qlora_jax.generate.prompting import Answer, Request, answer_text, check_stops, prompt_ids
from qlora_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden) -> Tokenizer:
    return Tokenizer.from_folder(golden / "tokenizer")


def test_alpaca_is_what_training_gives(tokenizer) -> None:
    for context in ("", "a, b"):
        example = tokenize_example(alpaca_prompt("Sort.", context), "x", tokenizer, 1000, 100)
        source = example.tokens[: int(example.loss_mask.argmax())].tolist()
        assert prompt_ids(tokenizer, "alpaca", Request("Sort.", context)) == source


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


class Letters:
    """A tokenizer of one id a character."""

    ends_source = False

    def stream(self, context, written):
        return self

    def push(self, ids):
        return "".join(map(chr, ids))

    def flush(self):
        return ""


words = st.text("ab#", min_size=1, max_size=4)


@given(st.text("ab#", max_size=30), st.lists(words, max_size=3), st.lists(st.integers(1, 5), max_size=30))
def test_a_stop_is_never_shown_whatever_the_pieces(text, stops, sizes) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    answer = Answer(Letters(), "plain", [], stops)
    shown, rest = "", text
    for size in [*sizes, len(text)]:
        shown += answer.push([ord(letter) for letter in rest[:size]])
        rest = rest[size:]
        assert expected.startswith(shown)
    assert answer.stopped == bool(ends)
    assert shown + answer.flush() == expected


def test_stops_come_beside_the_templates_own(tokenizer) -> None:
    prompt = tokenizer.encode("x", bos=True)
    for generated, shown in ((" One.\n END two", "One."), (" One.\n### Human: END", "One."), (" One. EN", "One. EN")):
        ids = tokenizer.encode("x" + generated)[len(prompt) - 1 :]
        assert answer_text(tokenizer, "guanaco", prompt, ids, ["END"]) == shown
    ids = tokenizer.encode("x a \nEND")[len(prompt) - 1 :]
    assert answer_text(tokenizer, "plain", prompt, ids, ["nothing", "END"]) == " a \n"
    with pytest.raises(InputError, match="a stop is empty"):
        check_stops(["a", ""])
    for bad in ("a\udcff", "\ud800"):
        with pytest.raises(InputError, match="a text is not UTF-8"):
            check_stops([bad])
        with pytest.raises(InputError, match="a text is not UTF-8"):
            prompt_ids(tokenizer, "guanaco", Request("Hi"), [{"role": "system", "content": bad}])
