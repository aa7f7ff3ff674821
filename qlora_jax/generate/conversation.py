"""A chat at a terminal or through a pipe: messages are answered, lines that begin with a slash are commands.

At a terminal Ctrl-C ends an answer and Ctrl-D the chat, and mistakes are told; through a pipe a mistake ends the run,
so that a script sees it.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_jax.generate.chat import Chat

HELP = """/system TEXT   gives the model a system line from the next answer on; without TEXT shows it
/reset         forgets the conversation, not the system line
/save FILE     writes the conversation as {"messages": [{"role", "content"}]}
/load FILE     goes on with a saved conversation
/quit          ends the chat
/help          this list
Ctrl-C ends an answer, Ctrl-D the chat. A blank before a slash makes it a message."""


class Conversation:
    """Reads stdin until its end.

    Args:
      interactive: whether a person types.
      show, note: print text of the model, and everything else.
    """

    def __init__(
        self,
        chat: "Chat",
        template: str,
        interactive: bool,
        show: Callable[[str], None],
        note: Callable[[str], None],
    ):
        self._chat, self._template, self._interactive = chat, template, interactive
        self._show, self._note = show, note
        self._saved: set[Path] = set()  # what this chat wrote, it may write again
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda argument: self._note(HELP),
        }

    def run(self) -> int:
        """Exit status 0 at the end of stdin. Raises InputError where nobody is there to be told."""
        from qlora_jax.errors import InputError

        if self._interactive:
            _edit_lines()
            self._note(f"chat (template {self._template}); /help lists the commands, Ctrl-D ends it")
        while True:
            try:
                line = self._read()
                if line is None or line.strip() == "/quit":
                    return 0
                if line.startswith("/"):
                    name, _, argument = line.strip().partition(" ")
                    self._commands.get(name, lambda argument, name=name: self._unknown(name))(argument.strip())
                elif line.strip():
                    self._answer(line.strip())
            except InputError as error:
                if not self._interactive:
                    raise
                self._note(f"error: {error}")

    def _read(self) -> str | None:
        """The next line, None at the end of stdin. Ctrl-C at a terminal empties the line."""
        from qlora_jax.errors import InputError

        while True:
            try:
                if not self._interactive:
                    return sys.stdin.readline() or None
                if sys.stdout.isatty() or "ipykernel" in sys.modules:
                    return input("> ")
                print("> ", end="", file=sys.stderr, flush=True)
                return sys.stdin.readline() or None
            except UnicodeDecodeError as error:
                raise InputError(f"a line of stdin is not UTF-8 ({error.reason}); convert it") from error
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._note("\n(Ctrl-D ends the chat)")
            except EOFError:
                self._note("")
                return None

    def _answer(self, message: str) -> None:
        from qlora_jax.generate.prompting import Request

        pieces = self._chat.answer(Request(message))
        try:
            for piece in pieces:
                self._show(piece)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
        finally:
            pieces.close()
        self._show("\n")

    def _system(self, text: str) -> None:
        from qlora_jax.generate.prompting import MANY_TURNS

        if self._template not in MANY_TURNS:
            self._note(f"(the template {self._template} has no place for a system line)")
        elif text:
            self._chat.system = text
            self._note("(system line set)")
        else:
            self._note(self._chat.system if self._chat.system is not None else "(the template's own)")

    def _reset(self, argument: str) -> None:
        self._chat.reset()
        self._note("(conversation forgotten)")

    def _save(self, name: str) -> None:
        from qlora_jax.generate.transcript import write_transcript

        if not name:
            self._note("(say where: /save FILE)")
            return
        path = Path(name).expanduser().absolute()
        write_transcript(path, self._chat.system, self._chat.turns, replace=path in self._saved)
        self._saved.add(path)
        self._note(f"(saved: {name}, {len(self._chat.turns)} messages)")

    def _load(self, name: str) -> None:
        from qlora_jax.generate.transcript import read_transcript

        if not name:
            self._note("(say which: /load FILE)")
            return
        system, turns = read_transcript(name)
        self._chat.reset()
        self._chat.system, self._chat.turns = system, turns
        self._note(f"(loaded: {name}, {len(turns)} messages)")

    def _unknown(self, name: str) -> None:
        self._note(f"(unknown command {name}: /help lists the commands; a blank before the slash makes it a message)")


def _edit_lines() -> None:
    """Arrow keys edit the line and bring back earlier ones, where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it is what gives input() its editing)
