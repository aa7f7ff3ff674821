"""--help of a command: one screen, from its docstring and its own flags. --helpfull: all of both, and libraries' flags.

A command's docstring begins with a paragraph that says what it is for. An example follows, indented, that runs in a
checkout as it stands; the rest is for --helpfull.
"""

import re
import shlex
import textwrap
from collections.abc import Sequence

from absl import flags

from experiments.support.command import command

LINES, COLUMNS = 24, 100
# Few readers need these: they are the first to lose their line where a command has many flags
_RARE = frozenset(("revision", "block_size", "compute_dtype", "kernel", "context", "seed"))
_VALUES = {"int": "N", "float": "X", "config file": "FILE"}  # what stands for a value, by the flag's type
_LAST = "--helpfull says all about this command and its flags."


def example(doc: str) -> list[str]:
    """Words of the docstring's example: ["experiments.NAME", arguments...]; [] where there is none.

    The first indented `python -m experiments.NAME`, with lines that a backslash continues.
    """
    match = re.search(r"^ +python -m ((?:.*\\\n)*.*)$", doc, re.MULTILINE)
    if match is None:
        return []
    return shlex.split(match[1].replace("\\\n", " "))


def screen(doc: str, own: Sequence[flags.Flag]) -> str:
    """--help, at most LINES lines of COLUMNS columns. `own`: the command's flags, in the order in which they matter."""
    head = textwrap.wrap(" ".join(doc.strip().split("\n\n")[0].split()), COLUMNS)
    if words := example(doc):
        head += ["", *_example(words)]
    room = LINES - len(head) - 3  # blank lines around the flags, and the last
    return "\n".join([*head, "", *_flag_lines(own, room), "", _LAST])


def whole(doc: str, own: Sequence[flags.Flag], libraries: str) -> str:
    """--helpfull."""
    lines = [doc.strip(), ""]
    for flag in own:
        begin = f"  {_name(flag)}"
        text = f"{flag.help}{'' if flag.default is None else f' (default: {flag.default_as_str})'}"
        lines += [begin, *textwrap.wrap(text, COLUMNS, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join([*lines, "", "Flags of libraries:", libraries])


def _example(words: list[str]) -> list[str]:
    text = command(words[0].removeprefix("experiments."), *words[1:])
    lines = textwrap.wrap(text, COLUMNS - 4, break_long_words=False, break_on_hyphens=False)
    return [f"{'  ' if i == 0 else '    '}{line}{' \\' if i + 1 < len(lines) else ''}" for i, line in enumerate(lines)]


def _flag_lines(own: Sequence[flags.Flag], room: int) -> list[str]:
    """A line for each flag; where there are too many, the last ones and rare ones stand by name alone."""
    shown, rest = list(own), list[flags.Flag]()
    while len(shown) + len(_rest(rest)) > room:
        out = next((flag for flag in reversed(shown) if flag.name in _RARE), shown[-1])
        shown.remove(out)
        rest.insert(0, out)
    width = max((len(_name(flag)) for flag in shown), default=0) + 2
    return [_line(flag, width) for flag in shown] + _rest(rest)


def _rest(rest: Sequence[flags.Flag]) -> list[str]:
    names = ", ".join(f"--{flag.name}" for flag in rest)
    return textwrap.wrap(f"  also {names}", COLUMNS, subsequent_indent="  ", break_on_hyphens=False) if rest else []


def _line(flag: flags.Flag, width: int) -> str:
    """A flag, and its help as far as it fits."""
    text = " ".join((flag.help or "").split()).removesuffix("; repeat this option to specify a list of values")
    if flag.default not in (None, False, "", []) and not flag.boolean:
        text += f" (default: {flag.default})"
    begin = f"  {_name(flag):{width}}"
    room = COLUMNS - len(begin)
    return begin + (text if len(text) <= room else text[: room - 3].rsplit(" ", 1)[0].rstrip(";:,. ") + " ..")


def _name(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--no{flag.name}" if flag.default else f"--{flag.name}"
    return f"--{flag.name}={_VALUES.get(flag.flag_type(), '...')}"
