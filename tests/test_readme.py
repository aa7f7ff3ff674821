"""README.md's commands are real: modules exist, flags and config keys parse, make's targets are in the Makefile."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SHELL_BLOCK = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SEPARATORS = {"&&", "||", "|", ";", "&"}


def shell_commands(markdown: str) -> list[list[str]]:
    """The commands of all fenced shell blocks, as words, without prompts, comments and variables set before them."""
    commands = []
    for block in SHELL_BLOCK.findall(markdown):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word in SEPARATORS:
                    commands += [words] if words else []
                    words = []
                elif words or not re.match(r"[A-Z_]+=", word):
                    words.append(word)
    return commands


def experiment_of(command: list[str]) -> list[str] | None:
    """Module and arguments of `python -m experiments.NAME ...`, up to a redirection."""
    if not Path(command[0]).name.startswith("python") or command[1:2] != ["-m"]:
        return None
    if len(command) < 3 or not command[2].startswith("experiments."):
        return None
    words = command[2:]
    return words[: next((i for i, word in enumerate(words) if word[0] in "<>"), len(words))]


@pytest.fixture(scope="module")
def readme() -> list[list[str]]:
    return shell_commands((REPOSITORY / "README.md").read_text())


def test_blocks_are_read_as_a_shell_reads_them() -> None:
    markdown = (
        "text\n```bash\n# comment\nmake test  # why\nX=1 python -m experiments.train \\\n"
        '  --prompt="a b" && cd x\n```\n```python\nmake no\n```\n```sh\n$ python3 -m experiments.plan > f\n```\n'
    )
    commands = shell_commands(markdown)
    assert commands[:3] == [["make", "test"], ["python", "-m", "experiments.train", "--prompt=a b"], ["cd", "x"]]
    assert [experiment_of(c) for c in commands] == [
        None,
        ["experiments.train", "--prompt=a b"],
        None,
        ["experiments.plan"],
    ]


def test_experiment_commands_parse(readme, run_commands) -> None:
    commands = [command for command in map(experiment_of, readme) if command]
    assert commands, "README.md shows no `python -m experiments.NAME` in a bash block"
    missing = [command[0] for command in commands if importlib.util.find_spec(command[0]) is None]
    assert not missing
    results = run_commands([[*command, "--only_check_args"] for command in commands])
    errors = [f"{shlex.join(c)}: {r['err']}" for c, r in zip(commands, results, strict=True) if r["status"] != 0]
    assert not errors, "\n".join(errors)


def test_make_targets_exist(readme) -> None:
    targets = {word for command in readme if command[0] == "make" for word in command[1:] if "=" not in word}
    assert targets >= {"quickstart", "test"}, "README.md must show the two commands"
    defined = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert targets <= defined
