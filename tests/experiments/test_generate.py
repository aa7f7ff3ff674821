"""The command `generate`, as a user calls it: one prompt, files of prompts, a piped chat, and mistakes in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_checkpoint import write_tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ["--max_new_tokens=8", "--temperature=0"]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", context=256)


@pytest.fixture(scope="module")
def results(folder, run_commands, golden) -> dict:
    """Name -> result of each command; all run in one process."""
    rows = [{"instruction": "Sort.", "input": "b, a"}, {"prompt": "Once"}, {"prompt": "Twice upon"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "lines.txt").write_text("Once\nTwice upon\n")
    (folder / "long.txt").write_text("Once\n" + "word " * 300)
    commands = {
        "plain": ["--prompt=Once", *SHORT],
        "empty": ["--prompt=", *SHORT],
        "seed 1": ["--prompt=Once", "--max_new_tokens=8", "--temperature=3", "--seed=1"],
        "seed 1 again": ["--prompt=Once", "--max_new_tokens=8", "--temperature=3", "--seed=1"],
        "seed 2": ["--prompt=Once", "--max_new_tokens=8", "--temperature=3", "--seed=2"],
        "alpaca": ["--prompt=Once", "--template=alpaca", *SHORT],
        "quantized": ["--prompt=Once", "--quant=nf4+dq", "--block_size=32", *SHORT],
        "lines": [f"--prompts={folder}/lines.txt", *SHORT],
        "rows": [f"--prompts={folder}/rows.jsonl", f"--out={folder}/new/out.jsonl", "--batch_size=2", *SHORT],
        "help": ["--help"],
        "no model": ["--prompt=Once", "--model=/nowhere/model"],
        "no adapter": ["--prompt=Once", "--adapter=/nowhere/adapter"],
        "adapter of another model": ["--prompt=Once", f"--adapter={golden}/peft/all_linear_r4"],
        "long": ["--prompt=" + "word " * 300],
        "long in a file": [f"--prompts={folder}/long.txt"],
        "temperature": ["--prompt=Once", "--temperature=-1"],
        "top_p": ["--prompt=Once", "--top_p=0"],
        "max_new_tokens": ["--prompt=Once", "--max_new_tokens=0"],
        "both": ["--prompt=Once", "--prompts=x.txt"],
        "out alone": ["--prompt=Once", "--out=x.jsonl"],
        "no template": ["--prompt=Once", "--template=chat"],
        "quant": ["--prompt=Once", "--quant=nf5"],
        "block size": ["--prompt=Once", "--quant=nf4", "--block_size=48"],
        "block size alone": ["--prompt=Once", "--block_size=32"],
    }
    found = run_commands([["experiments.generate", f"--model={folder}", *flags] for flags in commands.values()])
    return dict(zip(commands, found, strict=True))


def test_a_prompt_gives_the_text_alone(results) -> None:
    for name in ("plain", "empty", "quantized", "seed 1", "alpaca"):
        assert results[name]["status"] == 0, results[name]["err"]
    assert results["plain"]["out"].startswith("Once") and len(results["plain"]["out"]) > len("Once\n")
    assert not results["alpaca"]["out"].startswith("Once")
    assert "not quantized, computing in float32" in results["plain"]["err"]
    assert "nf4 + double quantization, blocks of 32" in results["quantized"]["err"]


def test_seeds(results) -> None:
    assert results["seed 1"]["out"] == results["seed 1 again"]["out"] != results["seed 2"]["out"]


def test_files_give_jsonl_in_their_order(results, folder) -> None:
    lines = [json.loads(line) for line in results["lines"]["out"].splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "text"}] * 2
    assert "Once" + lines[0]["text"] == results["plain"]["out"][:-1]
    rows = [json.loads(line) for line in (folder / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Sort.\n\nb, a", "Once", "Twice upon"]
    assert rows[1:] == lines
    assert results["rows"]["out"] == ""


def test_help_says_what_is_printed(results) -> None:
    assert results["help"]["status"] == 0
    for named in ("--temperature: ", "(default: '0.7')", "--template: ", "--adapter: ", "stdout gets text alone"):
        assert named in results["help"]["out"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no model", ["/nowhere/model"]),
        ("no adapter", ["/nowhere/adapter"]),
        ("adapter of another model", ["does not fit the base model"]),
        ("long", ["the message has", "the model's context of 256 leaves no room"]),
        ("long in a file", ["the prompt 'word", "context of 256"]),
        ("temperature", ["temperature is -1"]),
        ("top_p", ["top_p is 0"]),
        ("max_new_tokens", ["max_new_tokens is 0"]),
        ("both", ["--prompt and --prompts"]),
        ("out alone", ["--out is for the answers to --prompts"]),
        ("no template", ["has no chat template"]),
        ("quant", ["--quant=nf5", "nf4+dq"]),
        ("block size", ["block_size is 48"]),
        ("block size alone", ["--block_size=32 without --quant"]),
    ],
)
def test_mistakes_are_one_line(results, name, named, assert_one_line_error) -> None:
    assert_one_line_error(results[name], named)


def test_a_piped_chat(folder) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.generate",
        f"--model={folder}",
        "--temperature=2",
        "--max_new_tokens=4",
    ]
    chat = [*command, "--template=plain"]
    done = subprocess.run(chat, input="Hi\nHi\n\n/reset\nHi", capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    again = subprocess.run([*chat, "--prompt=Hi"], capture_output=True, text=True, cwd=REPOSITORY)
    first = again.stdout.removeprefix("Hi")
    assert done.stdout.startswith(first) and done.stdout.endswith(first) and len(done.stdout) > 2 * len(first)
    assert "(conversation forgotten)" in done.stderr


def test_stories260k(shared_data, run_commands) -> None:
    model = f"--model={shared_data}/stories260K"
    flags = ["--max_new_tokens=60", "--temperature=0"]
    whole, from_bos = run_commands(
        [["experiments.generate", model, prompt, *flags] for prompt in ("--prompt=Once upon a time", "--prompt=")]
    )
    assert whole["out"].startswith(STORY), whole
    assert from_bos["out"].startswith(STORY[: len("Once upon a time, there was a little girl named Lily.")]), from_bos
