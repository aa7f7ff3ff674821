"""README.md and docs/ are true: every block parses or runs, every command, flag, key, link and message exists."""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from qlora_jax import embedded
from qlora_jax.api.model import Model
from qlora_jax.base import get_config
from qlora_jax.settings import SECTIONS, flatten
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
MOST_LINES, MOST_COLUMNS = 150, 100  # of README.md
FENCE = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SEPARATORS = {"&&", "||", "|", ";", "&"}
SHELL, PYTHON = "bash", "python"
MESSAGE = re.compile(r"^\*\*`(.+)`\*\*$", re.MULTILINE)
# settings in place of a block's steps: the notebook's shapes, whose programs other tests compile too
SMALL = "steps=2, rank=16, batch_size=4"
# what stands as a key does: of a model in Python, of an example of what is wrong
NO_KEYS = {"model.generate", "model.template", "train"}
HOLE = "\0"  # in a message of the code, where a value stands


def blocks(markdown: str, language: str) -> list[str]:
    """The texts of all fenced blocks of a language."""
    return [text for _, found, text in FENCE.findall(markdown) if found == language]


def shell_commands(markdown: str) -> list[list[str]]:
    """The commands of all fenced shell blocks, as words, without comments and variables set before them."""
    commands = []
    for block in blocks(markdown, SHELL):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
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
    """Module and arguments of `qlora NAME ...` or `python -m experiments.NAME ...`."""
    name = Path(command[0]).name
    if name == "qlora":
        return [f"experiments.{command[1].replace('-', '_')}", *command[2:]]
    if name.startswith("python") and command[1:2] == ["-m"] and command[2].startswith("experiments."):
        return command[2:]
    return None


@cache
def commands_of(page: Path) -> list[list[str]]:
    return shell_commands(page.read_text(encoding="utf-8"))


@cache
def all_commands() -> list[list[str]]:
    return [command for page in PAGES for command in commands_of(page)]


def test_blocks_are_read_as_a_shell_reads_them():
    markdown = (
        "text\n```bash\n# comment\nmake test  # why\nX=1 python -m experiments.train \\\n"
        '  --prompt="a b" && cd x\n```\n```python\nmake no\n```\n```bash\nqlora bench-data --rows=3\n```\n'
    )
    commands = shell_commands(markdown)
    assert commands[:3] == [["make", "test"], ["python", "-m", "experiments.train", "--prompt=a b"], ["cd", "x"]]
    assert [experiment_of(c) for c in commands] == [
        None,
        ["experiments.train", "--prompt=a b"],
        None,
        ["experiments.bench_data", "--rows=3"],
    ]


def test_readme_is_a_letter():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert not [line for line in lines if len(line) > MOST_COLUMNS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_have_a_language_that_is_checked(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(FENCE.findall(text))
    assert {language for _, language, _ in FENCE.findall(text)} <= {SHELL, PYTHON}


def test_commands_parse(run_commands):
    commands = [command for command in map(experiment_of, all_commands()) if command]
    missing = [command[0] for command in commands if importlib.util.find_spec(command[0]) is None]
    assert not missing
    once = {tuple(command): command for command in commands}.values()
    results = run_commands([[*command, "--only_check_args"] for command in once])
    errors = [f"{shlex.join(c)}: {r['err']}" for c, r in zip(once, results, strict=True) if r["status"] != 0]
    assert not errors, "\n".join(errors)


def test_other_commands_are_known():
    """make's targets, extras of pip's, scripts; nothing else stands in a block."""
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) =$", (REPOSITORY / "setup.cfg").read_text(encoding="utf-8"), re.MULTILINE))
    for command in all_commands():
        match command:
            case ["make", *words]:
                assert {word for word in words if "=" not in word} <= targets, command
            case ["pip", "install", "-c", "constraints.txt", "-e", what]:
                assert set(what.removeprefix(".[").removesuffix("]").split(",")) <= extras, command
            case ["pip", "install", what] if what.startswith("qlora_jax["):
                assert set(what.removeprefix("qlora_jax[").removesuffix("]").split(",")) <= extras, command
            case ["python", script, *words] if script.startswith("scripts/"):
                text = (REPOSITORY / script).read_text(encoding="utf-8")
                assert all(f'"{word.partition("=")[0]}"' in text for word in words), command
            case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
                pass
            case _:
                assert experiment_of(command), f"no test knows this command: {shlex.join(command)}"


def test_readme_shows_the_two_commands():
    assert {("make", "quickstart"), ("make", "test")} <= {tuple(command) for command in commands_of(README)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_exist(page):
    """Keys of a config in blocks and in the text, with --config. or as SECTION.KEY between backticks."""
    keys = set(flatten(get_config()))
    text = page.read_text(encoding="utf-8")
    sections = "|".join(SECTIONS)
    named = re.findall(r"--config\.([\w.]+)", text)
    named += re.findall(rf"`((?:{sections})\.\w+)(?:=[^`]*)?`", text)
    assert set(named) - NO_KEYS <= keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    folders = "assets|configs|docs|examples|experiments|qlora_jax|results|scripts"
    paths = re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./*-]+)", text)
    paths = [path.rstrip(".") for path in paths if not path.startswith("configs/NAME")]
    assert not [path for path in paths if not (list(REPOSITORY.glob(path)) or (page.parent / path).exists())]


def test_every_page_is_linked():
    linked = set(re.findall(r"\]\((docs/[\w]+\.md)\)", README.read_text(encoding="utf-8")))
    assert linked == {str(page.relative_to(REPOSITORY)) for page in PAGES if page != README}


def python_blocks() -> list:
    found = []
    for page in PAGES:
        for number, (runs, language, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1):
            if language == PYTHON:
                found.append(pytest.param(text, bool(runs), id=f"{page.stem}-{number}"))
    return found


@pytest.mark.parametrize("text, runs", python_blocks())
def test_python_blocks(text, runs, tiny_quickstart, tmp_path, monkeypatch):
    """All compile; those under <!-- run --> run, on a smaller model, with fewer steps and tokens."""
    code = compile(re.sub(r"\bsteps=\d+", SMALL, text), "a block", "exec")
    if not runs:
        return
    monkeypatch.setattr(Model.generate, "__defaults__", (6, *Model.generate.__defaults__[1:]))
    monkeypatch.setitem(embedded.MODELS, "quickstart", str(tiny_quickstart))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alpaca.jsonl").write_text('{"instruction": "Say hi.", "input": "", "output": "hi"}\n' * 8)
    exec(code, {"__name__": "__main__"})


@pytest.fixture(scope="module")
def tiny_quickstart(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("docs") / "model", context=256)


def test_messages_are_those_of_the_code():
    """Each message of troubleshooting.md is one that the code has, its … where the code puts values in."""
    page = REPOSITORY / "docs" / "troubleshooting.md"
    shown = MESSAGE.findall(page.read_text(encoding="utf-8"))
    assert len(shown) == len(set(shown)) >= 60
    texts = "\n".join(messages_of_the_code())
    assert not [message for message in shown if not re.search(pattern_of(message), texts)]


def test_a_message_that_is_gone_is_found():
    texts = f"{HOLE} has no rows\n{HOLE}: no file"
    assert re.search(pattern_of("… has no rows"), texts)
    assert not re.search(pattern_of("… has no file"), texts)
    assert not re.search(pattern_of("data.json has no rows"), texts)


def pattern_of(message: str) -> str:
    """Matches within a line: the texts between holes in this order."""
    return ".*".join(re.escape(part) for part in message.strip("…").split("…"))


def messages_of_the_code() -> list[str]:
    """All texts of the code, each as one line, with holes for values."""
    found = []
    for folder in ("qlora_jax", "experiments"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return [" ".join(text.split()) for text in found]
