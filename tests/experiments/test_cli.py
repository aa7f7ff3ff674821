"""The harness of the commands, tried as a user does: a small command, its flags, and what the terminal shows."""

import json
import os
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

COMMAND = '''"""Prints what it was given."""
import json
import logging
import signal
import warnings

from absl import flags
from absl import logging as absl_logging

from experiments.support import cli
from qlora_jax.settings import resolved
from qlora_jax.errors import InputError

CONFIG = cli.config_flag(DEFAULT)
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
TOKENS = flags.DEFINE_integer("max_new_tokens", 5, "tokens to make")
QUANT = flags.DEFINE_enum("quant", "none", ["none", "nf4"], "format of the base")


def main():
    if WORKDIR.value == "input error":
        raise InputError("alpaca.json:7: no instruction")
    if WORKDIR.value == "bug":
        raise RuntimeError("a bug")
    if WORKDIR.value == "status":
        return 7
    if WORKDIR.value == "log":
        absl_logging.warning("absl speaks")
        logging.getLogger("jax._src.xla_bridge").warning("No GPU/TPU found")
    if WORKDIR.value == "interrupt":
        print("ready", flush=True)
        signal.pause()
    print(json.dumps(resolved(CONFIG.value)))


if __name__ == "__main__":
    cli.run(main)
'''

CONFIG = """from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.train = ConfigDict({"steps": 10, "batch_size": 16})
    c.lora = ConfigDict({"targets": ("all-linear",), "alpha": 16.0})
    c.model = ConfigDict({"path": "", "sizes": (1, 2)})
    c.eval = ConfigDict({"batch_size": 8})
    c.optimizer = ConfigDict({"learning_rate": 2e-4})
    c.quant = ConfigDict({"double_quant": True})
    return c
"""

BROKEN = {
    "syntax.py": "import os\ndef get_config(:\n",
    "without.py": "x = 1\n",
    "returns_none.py": "def get_config():\n    pass\n",
    "fails.py": "import nosuchmodule\n",
    "inner.py": "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict().nothing\n",
}

# arguments, and what the one line on stderr must name
MISTAKES = {
    "unknown flag": (["--workdr=x"], ["--workdr", "did you mean --workdir?"]),
    "config prefix forgotten": (["--train.steps=3"], ["--train.steps", "did you mean --config.train.steps?"]),
    "flag of no likeness": (["--zzz"], ["--zzz", "--max_new_tokens"]),
    "wrong type of a flag": (["--max_new_tokens=abc"], ["--max_new_tokens=abc", "expected an int"]),
    "value not in the list": (["--quant=nf5"], ["--quant=nf5", "none|nf4"]),
    "value missing": (["--max_new_tokens"], ["--max_new_tokens"]),
    "stray word": (["upon"], ["'upon'", "quoted"]),
    "key of another section": (
        ["--config.data.batch_size=4"],
        ["--config.data.batch_size", "did you mean --config.train.batch_size or --config.eval.batch_size?"],
    ),
    "key without section": (["--config.steps=4"], ["did you mean --config.train.steps?"]),
    "misspelt key": (["--config.eval.batchsize=4"], ["did you mean --config.eval.batch_size?"]),
    "key by its initials": (["--config.optimizer.lr=1"], ["did you mean --config.optimizer.learning_rate?"]),
    "key of no likeness": (["--config.lora.zzz=1"], ["the keys of lora are alpha, targets"]),
    "section of no likeness": (["--config.zzz.yyy=1"], ["the sections are model, quant, lora"]),
    "section for a key": (["--config.train=4"], ["train is a section", "--config.train.batch_size="]),
    "int": (["--config.train.steps=abc"], ["--config.train.steps=abc", "expected an int"]),
    "float for an int": (["--config.train.steps=1.5"], ["--config.train.steps=1.5", "expected an int"]),
    "float": (["--config.lora.alpha=x"], ["--config.lora.alpha=x", "expected a float"]),
    "bool": (["--config.quant.double_quant=maybe"], ["--config.quant.double_quant=maybe", "expected true or false"]),
    "no of an int": (["--noconfig.train.steps"], ["--config.train.steps=false", "expected an int"]),
    "empty item": (["--config.lora.targets=a,,b"], ["--config.lora.targets=a,,b", "empty item"]),
    "item's type": (["--config.model.sizes=1,b"], ["--config.model.sizes=b", "expected an int"]),
    "input error": (["--workdir=input error"], ["alpaca.json:7: no instruction"]),
}

CONFIG_MISTAKES = {
    "goood.py": ["no such file", "did you mean", "good.py"],
    "syntax.py": ["syntax.py:2", "SyntaxError"],
    "without.py": ["without.py", "get_config"],
    "returns_none.py": ["returns_none.py", "NoneType", "ConfigDict"],
    "fails.py": ["fails.py:1", "nosuchmodule"],
    "inner.py": ["inner.py:4", "nothing"],
}

# arguments, and the value that a key has then
OVERRIDES = [
    (["--config.train.steps=20"], "train.steps", 20),
    (["--config.train.steps", "20"], "train.steps", 20),
    (["--config.train.steps=20", "--config.train.steps=30"], "train.steps", 30),
    (["--config.lora.alpha=32"], "lora.alpha", 32.0),
    (["--config.optimizer.learning_rate", "1e-4"], "optimizer.learning_rate", 1e-4),
    (["--config.model.path=a=b, c"], "model.path", "a=b, c"),
    (["--config.quant.double_quant=false"], "quant.double_quant", False),
    (["--config.quant.double_quant", "false"], "quant.double_quant", False),
    (["--noconfig.quant.double_quant"], "quant.double_quant", False),
    (["--noconfig.quant.double_quant", "--config.quant.double_quant"], "quant.double_quant", True),
    (["--config.lora.targets=q_proj,v_proj"], "lora.targets", ["q_proj", "v_proj"]),
    (["--config.lora.targets=q_proj"], "lora.targets", ["q_proj"]),
    (["--config.lora.targets=q_proj", "--config.lora.targets=v_proj"], "lora.targets", ["q_proj", "v_proj"]),
    (["--config.lora.targets=('q_proj', 'v_proj')"], "lora.targets", ["q_proj", "v_proj"]),
    (['--config.lora.targets=["q_proj"]'], "lora.targets", ["q_proj"]),
    (
        [r"--config.lora.targets=layers\.\d{1,2}\.(q|v)_proj,[kv,]_proj"],
        "lora.targets",
        [r"layers\.\d{1,2}\.(q|v)_proj", "[kv,]_proj"],
    ),
    (["--config.lora.targets=[0]"], "lora.targets", ["[0]"]),
    (["--config.model.sizes=3,4,5"], "model.sizes", [3, 4, 5]),
    (["--config.model.sizes=(3,)"], "model.sizes", [3]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "command.py").write_text(COMMAND.replace("DEFAULT", "None"))
    (folder / "with_default.py").write_text(COMMAND.replace("DEFAULT", repr(str(folder / "good.py"))))
    (folder / "good.py").write_text(CONFIG)
    for name, text in BROKEN.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands) -> dict:
    """All the commands of this file that need no process of their own, run together."""
    command, good = [str(folder / "command.py")], [f"--config={folder / 'good.py'}", "--workdir=x"]
    commands = {f"mistake {name}": [*command, *good, *arguments] for name, (arguments, _) in MISTAKES.items()}
    commands |= {f"config {name}": [*command, f"--config={folder / name}", "--workdir=x"] for name in CONFIG_MISTAKES}
    commands |= {f"override {i}": [*command, *good, *arguments] for i, (arguments, _, _) in enumerate(OVERRIDES)}
    commands |= {
        "plain": [*command, *good],
        "override first": [*command, "--config.train.steps=20", *good],
        "no flags": command,
        "no config": [*command, "--workdir=x"],
        "default": [str(folder / "with_default.py"), "--workdir=x", "--config.train.steps=20"],
        "help": [*command, "--help"],
        "status": [*command, *good, "--workdir=status"],
        "bug": [*command, *good, "--workdir=bug"],
        "check": [*command, *good, "--workdir=bug", "--only_check_args"],
        "check mistake": [*command, *good, "--config.train.stepz=1", "--only_check_args"],
    }
    return dict(zip(commands, run_commands(list(commands.values())), strict=True))


def assert_one_line(result: dict, parts: list[str]) -> None:
    assert result["status"] == 2
    assert result["out"] == ""
    assert result["err"].startswith("error: ") and result["err"].count("\n") == 1, result["err"]
    for part in parts:
        assert part in result["err"]


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name: str, results: dict) -> None:
    assert_one_line(results[f"mistake {name}"], MISTAKES[name][1])


@pytest.mark.parametrize("name", CONFIG_MISTAKES)
def test_mistake_in_config_file_is_one_line(name: str, results: dict) -> None:
    assert_one_line(results[f"config {name}"], CONFIG_MISTAKES[name])


def test_missing_flags_are_named(results: dict) -> None:
    assert_one_line(results["no flags"], ["--workdir"])
    assert_one_line(results["no config"], ["--config=FILE", "configs/base.py"])


@pytest.mark.parametrize("i", range(len(OVERRIDES)))
def test_override(i: int, results: dict) -> None:
    result, (_, key, expected) = results[f"override {i}"], OVERRIDES[i]
    assert result["status"] == 0, result["err"]
    section, name = key.split(".")
    changed, plain = json.loads(result["out"]), json.loads(results["plain"]["out"])
    assert changed[section].pop(name) == expected
    assert type(expected) is type(plain[section].pop(name))
    assert changed == plain


def test_an_override_may_stand_before_the_config(results: dict) -> None:
    assert json.loads(results["override first"]["out"])["train"]["steps"] == 20


def test_default_config_is_used_and_overridden(results: dict) -> None:
    assert json.loads(results["default"]["out"])["train"] == {"batch_size": 16, "steps": 20}


def test_sections_are_in_order(results: dict) -> None:
    order = ["model", "quant", "lora", "optimizer", "train", "eval"]
    assert list(json.loads(results["plain"]["out"])) == order


def test_help_shows_docstring_and_own_flags(results: dict) -> None:
    result = results["help"]
    assert result["status"] == 0 and result["err"] == ""
    assert "Prints what it was given." in result["out"]
    assert "--workdir" in result["out"] and "--config.SECTION.KEY=VALUE" in result["out"]
    assert "--pdb" not in result["out"]


def test_exit_statuses(results: dict) -> None:
    assert results["status"]["status"] == 7
    assert results["bug"]["status"] == 1
    assert "RuntimeError: a bug" in results["bug"]["err"]


def test_only_check_args_stops_before_main(results: dict) -> None:
    assert results["check"] == {"status": 0, "out": "", "err": ""}
    assert_one_line(results["check mistake"], ["--config.train.stepz"])


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(folder / "command.py"), f"--config={folder / 'good.py'}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    # started in the background, the tests themselves may ignore the signal, and so would their children
    take_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=take_interrupts,
    )


def test_interrupted(folder: Path) -> None:
    process = start(folder, "--workdir=interrupt")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    said, command = err.splitlines()
    assert said == "interrupted; run the same command again to go on:"
    assert shlex.split(command)[1:] == [
        str(folder / "command.py"),
        f"--config={folder / 'good.py'}",
        "--workdir=interrupt",
    ]


def test_libraries_are_quiet_unless_asked(folder: Path) -> None:
    out, err = start(folder, "--workdir=log").communicate(timeout=60)
    assert json.loads(out) and err == ""
    _, err = start(folder, "--workdir=log", "--verbosity=0").communicate(timeout=60)
    assert "absl speaks" in err and "No GPU/TPU found" in err
