"""A chat answers as a fresh decoding of its conversation does, remembers, forgets, and keeps within the context."""

import numpy as np
import pytest

from qlora_jax.data.chat_examples import tokenize_chats
from qlora_jax.errors import InputError
from qlora_jax.generate.chat import Chat
from qlora_jax.generate.decode import complete
from qlora_jax.generate.prompting import Request, answer_text, prompt_ids
from qlora_jax.generate.sampling import Sampling
from qlora_jax.generate.transcript import read_transcript, write_transcript
from qlora_jax.text.chat import Chat as ChatData
from qlora_jax.text.tokenizer import Tokenizer
from tests.chat_templates import TURNED, TURNING
from tests.data.test_chat_examples import with_template

pytestmark = pytest.mark.quick_compile

GREEDY = Sampling(20, 0.0)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder)


def ask(chat: Chat, message: str) -> str:
    return "".join(chat.answer(Request(message)))


def test_later_turns_see_earlier_ones(tiny_model, tokenizer) -> None:
    chat = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [])
    ask(chat, "Hello")
    ask(chat, "And then?")
    prompt = prompt_ids(tokenizer, "guanaco", Request("Why?"), chat.turns)
    expected = answer_text(tokenizer, "guanaco", prompt, complete(tiny_model, [prompt], GREEDY, [])[0].tokens)
    assert ask(chat, "Why?") == expected
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 3
    assert chat.turns[2]["content"] == "And then?" and chat.turns[5]["content"] == expected.strip()


def test_reset_begins_anew_with_the_same_draws(tiny_model, tokenizer) -> None:
    chat = Chat(tiny_model, tokenizer, "guanaco", Sampling(20, 1.0, 1.0, 4), [])
    first, second = ask(chat, "Hello"), ask(chat, "Hello")
    assert first != second
    chat.reset()
    assert chat.turns == [] and ask(chat, "Hello") == first


def test_system_lines_and_stops(tiny_model, tokenizer) -> None:
    chat = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [], system="Be brief.")
    before = [{"role": "system", "content": "Be brief."}]
    prompt = prompt_ids(tokenizer, "guanaco", Request("Hello"), before)
    tokens = complete(tiny_model, [prompt], GREEDY, [])[0].tokens
    free = answer_text(tokenizer, "guanaco", prompt, tokens)
    assert ask(chat, "Hello") == free != ask(Chat(tiny_model, tokenizer, "guanaco", GREEDY, []), "Hello")
    stop = free[len(free) // 2 :][:3]
    stopped = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [], stops=["never seen", stop], system="Be brief.")
    assert ask(stopped, "Hello") == free[: free.index(stop)].rstrip()


def test_a_first_answer_is_drawn_as_in_a_file(tiny_model, tokenizer) -> None:
    sampling = Sampling(20, 1.0, 1.0, 4)
    prompt = prompt_ids(tokenizer, "guanaco", Request("Hello"))
    tokens = complete(tiny_model, [prompt], sampling, [])[0].tokens
    assert ask(Chat(tiny_model, tokenizer, "guanaco", sampling, []), "Hello") == answer_text(
        tokenizer, "guanaco", prompt, tokens
    )


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_single_turn_templates_take_each_message_by_itself(tiny_model, tokenizer, template) -> None:
    chat = Chat(tiny_model, tokenizer, template, GREEDY, [])
    assert ask(chat, "Hello") == ask(chat, "Hello")
    assert chat.turns == []


def test_an_answer_that_is_not_heard_out_is_remembered_so_far(tiny_model, tokenizer) -> None:
    chat = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [])
    pieces = chat.answer(Request("Hello"))
    heard = next(pieces)
    pieces.close()
    assert chat.turns[-1]["content"] == heard.strip()
    prompt = prompt_ids(tokenizer, "guanaco", Request("Go on"), chat.turns)
    expected = complete(tiny_model, [prompt], GREEDY, [])[0].tokens
    assert ask(chat, "Go on") == answer_text(tokenizer, "guanaco", prompt, expected)


def test_the_oldest_turns_are_forgotten_where_the_context_is_full(tiny_model, tokenizer) -> None:
    notes: list[str] = []
    chat = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [], notes.append)
    for number in range(6):
        ask(chat, f"{number} " + "word " * 60)
    assert any("forgotten: the model's context is 1024 tokens" in note for note in notes)
    assert 2 <= len(chat.turns) < 12 and chat.turns[-2]["content"].startswith("5 ")
    prompt = prompt_ids(tokenizer, "guanaco", Request("5 " + "word " * 60), chat.turns[:-2])
    assert len(prompt) + 20 <= 1024


class Scripted:
    """A decoding that says what it is given."""

    def __init__(self, said: list[int]):
        self._said, self.tokens = said, [[]]

    @property
    def done(self) -> bool:
        return len(self.tokens[0]) == len(self._said)

    def step(self, steps: int) -> list[list[int]]:
        new = self._said[len(self.tokens[0]) :][:steps]
        self.tokens[0] += new
        return [new]

    def finish(self, row: int, reason: str) -> None:
        self._said = self.tokens[0]

    def ends(self) -> list[tuple[list[int], str]]:
        return [(self.tokens[0], "eos")]


@pytest.mark.parametrize("kind", ["plain", "thinking", "inside"])
@pytest.mark.parametrize("family", ["recent", "opened", "empty", "unsaid", "endless", "closed", "channels"])
def test_the_model_is_asked_as_in_training(tiny_model, golden, tmp_path, monkeypatch, family, kind) -> None:
    """A model that answers as the data does gets, turn by turn, the very prompts of its training."""
    template, stops, *_ = TURNING[family]
    tokenizer = with_template(tmp_path / "model", golden / "chat", template, stops)
    messages, _ = TURNED[kind]
    system = {"role": "system", "content": "Be brief."}
    examples, _ = tokenize_chats([ChatData([system, *messages], None, "")], tokenizer, 10_000)
    turns = []
    for example in examples:
        edges = np.flatnonzero(np.diff(example.loss_mask, prepend=False, append=False)).reshape(-1, 2)
        turns += [(example.tokens[:begin].tolist(), example.tokens[begin:end].tolist()) for begin, end in edges]
    turns.sort(key=lambda turn: len(turn[0]))
    asked = []

    def read(chat: Chat, prompt: list[int]) -> Scripted:
        asked.append(prompt)
        return Scripted(turns[len(asked) - 1][1][:-1])

    monkeypatch.setattr(Chat, "_read", read)
    chat = Chat(tiny_model, tokenizer, "chat", GREEDY, [], system="Be brief.")
    shown = [ask(chat, message["content"]) for message in messages if message["role"] == "user"]
    if (family, kind) != ("unsaid", "thinking"):  # its words after the reasoning have no blank line before them
        assert asked == [prompt for prompt, _ in turns]
    if family in ("recent", "opened", "endless"):
        assert all(("</think>" in text) for text in shown)  # a control token, shown all the same
    assert all(
        message["content"].split("</think>")[-1].strip() in text
        for message, text in zip(messages[1::2], shown, strict=True)
    )
    if family == "recent" and kind == "thinking":
        assert chat.turns == messages
        write_transcript(tmp_path / "chat.jsonl", "Be brief.", chat.turns, False)
        assert read_transcript(str(tmp_path / "chat.jsonl")) == ("Be brief.", messages)


def test_a_message_longer_than_the_context_is_refused(tiny_model, tokenizer) -> None:
    chat = Chat(tiny_model, tokenizer, "guanaco", GREEDY, [])
    with pytest.raises(InputError, match="the message has .* tokens; the model's context of 1024"):
        ask(chat, "word " * 3000)
    assert ask(chat, "Hello") and len(chat.turns) == 2
