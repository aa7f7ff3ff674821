"""The data command, run as a user does."""

import json
import shutil

import pytest

from qlora_jax.data.known import KNOWN_SETS
from tests.chat_templates import CHATML
from tests.conftest import REPOSITORY
from tests.data.test_chat_examples import with_template


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def results(run_commands, folder):
    chats = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}]} for n in "ab"]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "zero.json").write_text("")
    base = [
        "experiments.data",
        "--config=configs/quickstart.py",
        "--config.data.eval_path=",
        "--config.data.eval_examples=0",
    ]
    chat = [*base, f"--config.data.path={folder / 'chats.jsonl'}"]
    model = folder / "model"
    with_template(model, REPOSITORY / "tests" / "golden" / "chat", CHATML)
    shutil.copyfile(REPOSITORY / "assets" / "tiny_llama" / "config.json", model / "config.json")
    commands = {
        "template": [*chat, f"--config.model.path={model}", "--config.data.format=messages", "--show=1"],
        "chats": [*chat, "--config.data.format=messages", "--show=1", f"--out={folder / 'out' / 'figures.json'}"],
        "color": [*chat, "--config.data.format=messages", "--show=1", "--color=always"],
        "wrong format": chat,
        "zero": [*base, f"--config.data.path={folder / 'zero.json'}"],
        "unknown": [*base, "--config.data.path=alpacca"],
        "batches": [*base, "--config.data.batches=b.npy"],
        "help": ["experiments.data", "--help"],
    }
    return dict(zip(commands, run_commands(list(commands.values())), strict=True))


def test_examples_and_figures(results, folder):
    result = results["chats"]
    assert result["status"] == 0, result["err"]
    for part in (
        "chats.jsonl, line 1: ",
        "<BOS>⟦### Human: Qa\n### Assistant: A<EOS>⟧",
        "(messages): 2 rows, 2 examples",
        "padding: ",
    ):
        assert part in result["out"]
    assert "line 2" not in result["out"]
    figures = json.loads((folder / "out" / "figures.json").read_text())
    assert figures["examples"] == 2 and figures["heldout"] == 0
    assert figures["tokens"] == figures["targets"] + 2
    assert "\x1b[32m" in results["color"]["out"] and "⟦" not in results["color"]["out"]


def test_chats_in_the_models_template(results):
    result = results["template"]
    assert result["status"] == 0, result["err"]
    assert "<|im_start|>user\nQa<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n" in result["out"]
    assert "in the model's chat template (data.template=auto)" in result["out"]


def test_errors(results, assert_one_line_error):
    assert_one_line_error(
        results["wrong format"], ["line 1", 'no field "instruction"', "data.format=messages reads it"]
    )
    assert_one_line_error(results["zero"], ["zero.json is empty (0 bytes)"])
    assert_one_line_error(results["unknown"], ["alpacca: no such file", *KNOWN_SETS])
    assert_one_line_error(results["batches"], ["data.batches", "give data.path"])


def test_help_lists_the_known_sets(results):
    assert all(name in results["help"]["out"] for name in KNOWN_SETS)
