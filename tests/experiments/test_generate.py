"""The command `generate`, as a user calls it: one prompt, files of prompts, a chat, and mistakes in one line."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = ["--max_new_tokens=8", "--temperature=0"]
WARM = ["--max_new_tokens=8", "--temperature=3"]
MANY = ["--max_new_tokens=96", "--temperature=1"]
QUESTIONS = [
    {"question_id": 7, "category": "generic", "turns": ["How?"]},
    {"question_id": 8, "category": "math", "text": "### Human: Hi ### Assistant: Hello ### Human: Why? ### Assistant:"},
    {"id": "c", "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"}]},
]
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", context=256)


def kill_after_first_answers(command: list[str]) -> None:
    out = Path(next(flag for flag in command if flag.startswith("--out=")).removeprefix("--out="))
    with subprocess.Popen(
        [sys.executable, "-m", *command, "--batch_size=2"], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (out.exists() and out.stat().st_size):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def results(folder, run_commands, golden) -> dict:
    """Name -> result of each command; all run in one process."""
    rows = [{"instruction": "Sort.", "input": "b, a"}, {"prompt": "Once"}, {"prompt": "Twice upon"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "lines.txt").write_text("Once\nTwice upon\n")
    (folder / "long.txt").write_text("Once\n" + "word " * 300)
    (folder / "empty.jsonl").touch()
    (folder / "seeds.jsonl").write_text("\n".join(json.dumps({"prompt": "Once", "seed": seed}) for seed in (3, 3, 4)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    many = [f"Prompt {number % 20}" for number in range(24)]
    (folder / "many.txt").write_text("\n".join(many))
    (folder / "other.txt").write_text("\n".join([*many[:-1], "another"]))
    killed = folder / "killed.jsonl"
    kill_after_first_answers(
        ["experiments.generate", f"--model={folder}", f"--prompts={folder}/many.txt", f"--out={killed}", *MANY]
    )
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
        "stop": ["--prompt=Once", "--stop=never seen", *SHORT],
        "sampled row": [f"--prompts={folder}/seeds.jsonl", *WARM],
        "sampled alone": ["--prompt=Once", "--seed=3", *WARM],
        "questions": [f"--prompts={folder}/questions.jsonl", f"--out={folder}/a.jsonl", "--system=Be brief.", *SHORT],
        "nothing to do": [
            f"--prompts={folder}/questions.jsonl",
            f"--out={folder}/a.jsonl",
            "--system=Be brief.",
            *SHORT,
        ],
        "resumed": [f"--prompts={folder}/many.txt", f"--out={killed}", "--batch_size=2", *MANY],
        "undisturbed": [f"--prompts={folder}/many.txt", f"--out={folder}/undisturbed.jsonl", "--batch_size=2", *MANY],
        "other settings": [f"--prompts={folder}/many.txt", f"--out={killed}", *MANY, "--seed=9", "--top_k=5"],
        "other prompts": [f"--prompts={folder}/other.txt", f"--out={killed}", *MANY],
        "fewer prompts": [f"--prompts={folder}/lines.txt", f"--out={killed}", *MANY],
        "empty stop": ["--prompt=Once", "--stop="],
        "system for plain": ["--prompt=Once", "--system=x"],
        "system for plain rows": [f"--prompts={folder}/lines.txt", "--system=x"],
        "conversation for alpaca": [f"--prompts={folder}/questions.jsonl", "--template=alpaca"],
        "no prompts": [f"--prompts={folder}/empty.jsonl"],
        "out is a folder": [f"--prompts={folder}/lines.txt", f"--out={folder}"],
        "out is the prompts": [f"--prompts={folder}/lines.txt", f"--out={folder}/lines.txt", "--overwrite"],
        "min_p": ["--prompt=Once", "--min_p=2"],
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
    after = killed.read_bytes()
    found = run_commands([["experiments.generate", f"--model={folder}", *flags] for flags in commands.values()])
    return {**dict(zip(commands, found, strict=True)), "killed after": after}


def test_a_prompt_gives_the_text_alone(results) -> None:
    for name in ("plain", "empty", "quantized", "seed 1", "alpaca", "stop"):
        assert results[name]["status"] == 0, results[name]["err"]
    assert results["plain"]["out"].startswith("Once") and len(results["plain"]["out"]) > len("Once\n")
    assert results["stop"]["out"] == results["plain"]["out"]
    assert not results["alpaca"]["out"].startswith("Once")
    assert "not quantized, computing in float32" in results["plain"]["err"]
    assert "nf4 + double quantization, blocks of 32" in results["quantized"]["err"]


def test_seeds(results) -> None:
    assert results["seed 1"]["out"] == results["seed 1 again"]["out"] != results["seed 2"]["out"]


def test_files_give_jsonl_in_their_order(results, folder) -> None:
    lines = [json.loads(line) for line in results["lines"]["out"].splitlines()]
    fields = ["question_id", "prompt", "text", "reason", "answer_id", "model_id"]
    assert [list(line) for line in lines] == [fields] * 2
    assert [(line["question_id"], line["reason"], line["model_id"]) for line in lines] == [
        (1, "length", "model"),
        (2, "length", "model"),
    ]
    assert "Once" + lines[0]["text"] == results["plain"]["out"][:-1]
    rows = [json.loads(line) for line in (folder / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Sort.\n\nb, a", "Once", "Twice upon"]
    assert [row["text"] for row in rows[1:]] == [line["text"] for line in lines]
    assert results["rows"]["out"] == ""


def test_a_killed_run_ends_with_the_same_file(results, folder) -> None:
    first = results["killed after"]
    assert 0 < first.count(b"\n") < 24, "killed too late"
    whole = (folder / "killed.jsonl").read_bytes()
    assert whole.startswith(first[: first.rindex(b"\n") + 1])
    assert whole == (folder / "undisturbed.jsonl").read_bytes()
    assert f"has {first.count(b'\n')} of 24 answers; going on after them" in results["resumed"]["err"]
    rows = [json.loads(line) for line in whole.decode().splitlines()]
    assert [row["prompt"] for row in rows] == [f"Prompt {number % 20}" for number in range(24)]
    assert len({row["answer_id"] for row in rows}) == 24
    assert rows[0]["text"] != rows[20]["text"], "a prompt that comes twice has two answers"


def test_questions_of_a_benchmark_are_answered_for_a_judge(results, folder) -> None:
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert [(row["question_id"], row.get("category"), row["prompt"]) for row in rows] == [
        (7, "generic", "How?"),
        (8, "math", "Why?"),
        ("c", None, "Who?"),
    ]
    assert all(row["answer_id"] and row["model_id"] == "model" and row["text"] for row in rows)
    assert "has the answers to all 3 prompts; nothing to do" in results["nothing to do"]["err"]
    assert "computing in" not in results["nothing to do"]["err"], "the model was loaded"


def test_a_rows_seed_is_that_of_the_command(results) -> None:
    first, second, third = (json.loads(line)["text"] for line in results["sampled row"]["out"].splitlines())
    assert results["sampled alone"]["out"] == f"Once{first}\n" and first == second != third


def test_help_says_what_is_printed(results) -> None:
    assert results["help"]["status"] == 0
    for named in ("--temperature=X", "(default: 0.7)", "--template=", "--adapter=", "stdout by default"):
        assert named in results["help"]["out"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("no model", ["/nowhere/model"]),
        ("no adapter", ["/nowhere/adapter"]),
        ("adapter of another model", ["does not fit the base model"]),
        ("long", ["the message has", "the model's context of 256 leaves no room"]),
        ("long in a file", ["the prompt 'word", "context of 256"]),
        ("other settings", ["seed: 0 there, 9 here", "top_k: 0 there, 5 here", "--overwrite"]),
        ("other prompts", ["killed.jsonl, line 24: the answer to another prompt", "--overwrite"]),
        ("fewer prompts", ["killed.jsonl, line 1: the answer to another prompt"]),
        ("empty stop", ["a stop is empty"]),
        ("system for plain", ["--system: the template plain has no place for it"]),
        ("system for plain rows", ["the prompt 'Once': the template plain has no place for a system line"]),
        ("conversation for alpaca", ["line 2: the template alpaca has no place for a conversation"]),
        ("no prompts", ["empty.jsonl is empty (0 bytes)"]),
        ("out is a folder", ["is no plain file"]),
        ("out is the prompts", ["lines.txt is the file of prompts itself"]),
        ("min_p", ["min_p is 2"]),
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


def test_a_piped_chat(folder, run_commands) -> None:
    flags = [f"--model={folder}", "--temperature=2", "--max_new_tokens=4", "--template=plain"]
    (again,) = run_commands([["experiments.generate", *flags, "--prompt=Hi"]])
    command = [sys.executable, "-m", "experiments.generate", *flags]
    done = subprocess.run(command, input="Hi\nHi\n\n/reset\nHi", capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    first = again["out"].removeprefix("Hi")
    assert done.stdout.startswith(first) and done.stdout.endswith(first) and len(done.stdout) > 2 * len(first)
    assert "(conversation forgotten)" in done.stderr


def test_a_chat_at_a_terminal(tmp_path) -> None:
    """A person's way: a long answer is interrupted, the chat goes on, and Ctrl-D ends it with status 0.

    One Ctrl-C may have to be pressed again: of 40,000 sent to Python's input() alone as its prompt appeared, 3 had no
    answer.
    """
    model = write_tiny_checkpoint(tmp_path / "model", context=2**14)  # an answer of minutes
    command = [sys.executable, "-m", "experiments.generate", f"--model={model}", "--max_new_tokens=16000"]
    at_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", at_terminal, *command, "--template=guanaco"],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    os.close(its_end)
    seen = ""

    def wait_for(pattern: str, seconds: float = 120) -> bool:
        """False where it did not come within the seconds."""
        nonlocal seen
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[a-z]", "", seen))):
            if time.monotonic() > end:
                return False
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        seen = found.string[found.end() :]
        return True

    def expect(pattern: str) -> None:
        assert wait_for(pattern), f"{pattern!r} did not come: {seen!r}"

    def type_in(text: str) -> None:
        os.write(terminal, text.encode())

    lost = 0

    def interrupt_until(pattern: str) -> None:
        nonlocal lost
        type_in("\x03")
        if not wait_for(pattern, seconds=60):
            lost += 1
            type_in("\x03")
            expect(pattern)

    try:
        expect("> ")
        interrupt_until("Ctrl-D ends the chat")
        expect("> ")
        type_in("Hello there\n")
        expect(r"Hello there\r+\n.{20}")  # twenty letters of the answer
        interrupt_until("> ")
        type_in("/save said.jsonl\n")
        expect("saved: said.jsonl, 2 messages")
        expect("> ")
        type_in("/nonsense\n")
        expect("unknown command /nonsense")
        expect("> ")
        type_in("\x04")
        assert process.wait(60) == 0 and lost <= 1
        (message, answer) = json.loads((tmp_path / "said.jsonl").read_text())["messages"]
        assert message["content"] == "Hello there" and answer["content"]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_stories260k(shared_data, run_commands) -> None:
    model = f"--model={shared_data}/stories260K"
    flags = ["--max_new_tokens=60", "--temperature=0"]
    whole, from_bos = run_commands(
        [["experiments.generate", model, prompt, *flags] for prompt in ("--prompt=Once upon a time", "--prompt=")]
    )
    assert whole["out"].startswith(STORY), whole
    assert from_bos["out"].startswith(STORY[: len("Once upon a time, there was a little girl named Lily.")]), from_bos
