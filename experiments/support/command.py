"""Commands as a user types them: the one that runs now, and others to go on with."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_CONSOLE = "qlora"  # the console command that has the others as its first argument
_as_console = False  # whether this process was started by it


def under_one_name() -> None:
    """From now on commands are shown as `qlora NAME`."""
    global _as_console
    _as_console = True


def this_command() -> str:
    """The command line of this process, to be run again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if _as_console and spec is not None:
        return command(spec.name.rpartition(".")[2], *sys.argv[1:])
    program = [python(), "-m", spec.name] if spec is not None else [_program()]
    return " ".join([*program, *map(quoted, sys.argv[1:])])


def command(name: str, *arguments: str) -> str:
    """The command `name` of this project with these arguments, in the form in which this process was started."""
    if _as_console:
        return " ".join([_CONSOLE, name, *map(quoted, arguments)])
    return " ".join([python(), "-m", f"experiments.{name}", *map(quoted, arguments)])


def python() -> str:
    """The shortest name of this Python here: `python` where a shell finds it by that, or its path."""
    executable = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).absolute() == executable.absolute():
        return "python"
    try:
        return str(executable.relative_to(Path.cwd()))
    except ValueError:
        return str(executable)


def quoted(argument: str) -> str:
    """For a shell, on one line: "--prompt='a b'"."""
    flag, equals, value = argument.partition("=")
    if equals and flag.startswith("-") and flag == shlex.quote(flag):
        return flag + equals + (_quoted(value) if value else "")
    return _quoted(argument)


def _quoted(text: str) -> str:
    if "\n" not in text:
        return shlex.quote(text)
    inner = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{inner}'"


def _program() -> str:
    name = sys.argv[0]
    found = shutil.which(Path(name).name)
    if found is not None and Path(found).absolute() == Path(name).absolute():
        return Path(name).name
    return " ".join(quoted(word) for word in ([python(), name] if name.endswith(".py") else [name]))


def block(commands: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of (what it does, command), each command on a line of its own that can be copied whole."""
    return [line for what, text in commands for line in (f"  # {what}", f"  {text}")]
