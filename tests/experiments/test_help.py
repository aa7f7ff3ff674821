"""--help of every command: one screen, its own flags, and an example that runs."""

import importlib.util
import shlex
from pathlib import Path

import pytest

from experiments.support.help import COLUMNS, LINES, example

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = sorted(file.stem for file in (REPOSITORY / "experiments").glob("*.py") if file.stem != "__init__")
NEW = ("runs/",)  # what examples make, or train's example has made
# those that need no model and no time
QUICK = ("agreement", "data", "judge", "tournament")


def doc_of(name: str) -> str:
    spec = importlib.util.find_spec(f"experiments.{name}")
    assert spec is not None and spec.origin is not None
    return compile(Path(spec.origin).read_text(), spec.origin, "exec").co_consts[0]


@pytest.fixture(scope="module")
def helps(run_commands) -> dict[str, str]:
    results = run_commands([[f"experiments.{name}", "--help"] for name in COMMANDS])
    assert all(result["status"] == 0 and result["err"] == "" for result in results)
    return {name: result["out"] for name, result in zip(COMMANDS, results, strict=True)}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_screen(name, helps):
    lines = helps[name].splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= COLUMNS
    assert "--pdb" not in helps[name] and "--helpfull" in lines[-1]
    words = shlex.split(" ".join(helps[name].split("\n\n")[1].replace("\\\n", " ").split()))
    assert words[words.index("-m") + 1 :] == example(doc_of(name))


def test_examples_parse_and_name_what_is_there(run_commands):
    examples = [example(doc_of(name)) for name in COMMANDS]
    assert [words[0] for words in examples] == [f"experiments.{name}" for name in COMMANDS]
    results = run_commands([[*words, "--only_check_args"] for words in examples])
    assert not [(words, r["err"]) for words, r in zip(examples, results, strict=True) if r["status"] != 0]
    values = [word.partition("=")[2] for words in examples for word in words[1:] if "/" in word]
    assert len(values) > 20
    assert not [value for value in values if not value.startswith(NEW) and not (REPOSITORY / value).exists()]


def test_quick_examples_run(run_commands, tmp_path):
    commands = [[word.replace("=runs/", f"={tmp_path}/") for word in example(doc_of(name))] for name in QUICK]
    commands[QUICK.index("tournament")].append("--orderings=100")
    for command, result in zip(commands, run_commands(commands), strict=True):
        assert result["status"] == 0, (command, result["err"])
    assert (tmp_path / "elo" / "elo.json").exists()


def test_the_whole_help_has_all(run_commands):
    (result,) = run_commands([["experiments.judge", "--helpfull"]])
    assert result["status"] == 0
    for said in ("A judge is any OpenAI-compatible endpoint", "--tokens_field=", "--pdb", "--verbosity"):
        assert said in result["out"]


def test_flags_without_a_line_are_named(helps):
    assert "  also " in helps["judge"] and "--dry_run" in helps["judge"]
    assert "  also " not in helps["train"]
