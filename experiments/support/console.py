"""`qlora NAME ...`: the commands under one name, each as `python -m experiments.NAME`."""

import ast
import difflib
import re
import runpy
import sys
from pathlib import Path
from textwrap import shorten

from experiments.support import command

_FOLDER = Path(__file__).resolve().parents[1]
_FIRST = ("train", "generate", "plan", "evaluate", "quantize", "export", "data", "quickstart", "report")


def main() -> int:
    """Runs the command that the first argument names; without one lists them all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-help", "-h", "help", "-?"):
        print(listing())
        return 0
    known = commands()
    module = name.replace("-", "_")
    if module not in known:
        near = difflib.get_close_matches(module, known, n=1, cutoff=0.5)
        hint = f"did you mean qlora {near[0]}?" if near else f"there are {', '.join(known)}"
        print(f"error: qlora {name}: no such command; {hint}", file=sys.stderr)
        return 2
    command.under_one_name()
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(f"experiments.{module}", run_name="__main__", alter_sys=True)
    return 0


def commands() -> list[str]:
    """Their names, those that are needed first before the others."""
    found = {file.stem for file in _FOLDER.glob("*.py") if file.stem != "__init__"}
    first = [name for name in _FIRST if name in found]
    return [*first, *sorted(found - set(first))]


def listing() -> str:
    """Every command with the first sentence of its docstring; none is imported for it."""
    lines = ["qlora NAME --flag=value ... (the same as python -m experiments.NAME)", ""]
    width = max(map(len, commands())) + 2
    lines += [f"  {name:{width}}{shorten(sentence(name), 98 - width, placeholder=' ..')}" for name in commands()]
    lines += ["", "qlora NAME --help says more.", "An example: qlora train --model=quickstart --data=quickstart"]
    return "\n".join(lines)


def sentence(name: str) -> str:
    """What a command does, from its docstring: up to its example, or its first full stop."""
    text = ast.get_docstring(ast.parse((_FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    begin = " ".join(text.split("\n\n")[0].split()).partition(" (")[0]
    return re.split(r"(?::|\.)?\s*(?:`?python -m|`?qlora )|\.\s|\.$|:\s", begin)[0].strip(" .:")
