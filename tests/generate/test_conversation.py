"""The commands of a chat, with a stand-in for the model; what is saved can be loaded, and read as data."""

import io
import json

import pytest

from qlora_jax.data.read import read_rows
from qlora_jax.errors import InputError
from qlora_jax.generate.conversation import Conversation


class Echo:
    """Answers with the message, and stops to be interrupted where it says so."""

    def __init__(self):
        self.turns, self.system = [], None

    def reset(self):
        self.turns = []

    def answer(self, request):
        said = ""
        try:
            for word in request.text.split():
                if word == "^C":
                    raise KeyboardInterrupt
                if word == "mistake":
                    raise InputError("a mistake")
                said += word
                yield word
        finally:
            self.turns += [{"role": "user", "content": request.text}, {"role": "assistant", "content": said}]


@pytest.fixture
def talk(monkeypatch, tmp_path):
    """Gives lines to a chat; returns what it shows, what it notes and the chat."""
    monkeypatch.chdir(tmp_path)

    def talk(*lines: str, interactive: bool = True, template: str = "guanaco"):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        shown, notes, chat = [], [], Echo()
        assert Conversation(chat, template, interactive, shown.append, notes.append).run() == 0
        return "".join(shown), "\n".join(notes), chat

    return talk


def test_messages_and_commands(talk) -> None:
    shown, notes, chat = talk("Hi you", "", "/reset", "/helo", " /etc is a folder", "/help")
    assert shown == "Hiyou\n/etcisafolder\n"
    assert "(conversation forgotten)" in notes and "(unknown command /helo: /help lists" in notes
    assert "/save FILE" in notes and [turn["content"] for turn in chat.turns] == ["/etc is a folder", "/etcisafolder"]


def test_an_interrupted_answer_and_a_mistake_do_not_end_the_chat(talk) -> None:
    shown, notes, chat = talk("One ^C two", "mistake", "Three")
    assert shown == "One\nThree\n" and "error: a mistake" in notes
    assert [turn["content"] for turn in chat.turns[:2]] == ["One ^C two", "One"]
    with pytest.raises(KeyboardInterrupt):
        talk("One ^C two", interactive=False)
    with pytest.raises(InputError, match="a mistake"):
        talk("mistake", interactive=False)


def test_system_lines(talk) -> None:
    _, notes, chat = talk("/system", "/system Be  brief.", "/reset", "/system")
    assert chat.system == "Be  brief."
    assert notes.splitlines()[1:] == [
        "(the template's own)",
        "(system line set)",
        "(conversation forgotten)",
        "Be  brief.",
    ]
    _, notes, chat = talk("/system Be brief.", template="alpaca")
    assert "the template alpaca has no place for a system line" in notes and chat.system is None


def test_what_is_saved_can_be_loaded(talk, tmp_path) -> None:
    _, notes, said = talk(
        "/save a.jsonl", "/system Be brief.", "Où ?", "/save a.jsonl", "More", "/save a.jsonl", "/save"
    )
    assert "nothing was said yet" in notes and "(saved: a.jsonl, 4 messages)" in notes and "(say where" in notes
    system = {"role": "system", "content": "Be brief."}
    (line,) = (tmp_path / "a.jsonl").read_text().splitlines()
    assert json.loads(line) == {"messages": [system, *said.turns]} and "Où" in line
    _, notes, chat = talk("Hi", "/load a.jsonl", "/save a.jsonl", "/save b.json", "/load", "/load c.json")
    assert chat.turns == said.turns and chat.system == "Be brief."
    assert "a.jsonl exists already; choose another name" in notes and "(say which" in notes
    assert "c.json: no such file" in notes
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.jsonl").read_text()
    assert read_rows("a.jsonl")[0].fields["messages"][0] == system


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"messages": [{"role": "user", "content": "a"}]}', "in turn, ended by the assistant's"),
        ('{"messages": []}', "in turn, ended by"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "in turn, ended by"),
        ('{"text": "a"}', 'no field "messages"'),
        ('{"messages": []}\n{"messages": []}', "holds 2 rows; expected one conversation"),
        ("", "empty"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(talk, tmp_path, content, named) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    _, notes, chat = talk("Hi", "/load a.jsonl", "/save nowhere/b.json")
    assert named in notes and len(chat.turns) == 2 and "nowhere/b.json cannot be written" in notes
