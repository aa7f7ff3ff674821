"""The command `evaluate`: results in the agreed form, known figures on real data, mistakes in one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

KEYS = ["task", "quant", "tokens", "nll_per_token", "perplexity"]
# nats a token, measured with transformers on the same windows; int4 and fp4 with their dequantized weights
STORIES = {"none": 1.898, "nf4": 2.021, "int4": 2.087, "fp4": 2.141}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", context=32)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"first\nna\xefve\n")
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands, golden) -> dict:
    """Name -> result of each command; all run in one process."""
    from qlora_jax.text.tokenizer import Tokenizer

    text, out = f"--text={folder}/text.txt", f"--out={folder}/out/"
    np.save(folder / "ids.npy", Tokenizer.from_folder(folder).encode((folder / "text.txt").read_text()))
    np.save(folder / "foreign.npy", np.array([1, 2, 400]))
    commands = {
        "none": [text, out + "none.json"],
        "ids": [f"--tokens={folder}/ids.npy", out + "ids.json", "--batch_size=2", "--quant=none"],
        "fp4+dq": [text, out + "fp4.json", "--quant=fp4+dq"],
        "half context": [text, out + "half.json", "--context=16"],
        "no file": [text],
        "stored": [text, f"--model={golden}/bnb4bit/nf4_dq", "--tokens=x"],
        "task": [text, "--task=squad"],
        "neither": [],
        "empty": [f"--text={folder}/empty.txt"],
        "latin": [f"--text={folder}/latin.txt"],
        "absent": [f"--text={folder}/absent.txt"],
        "foreign": [f"--tokens={folder}/foreign.npy"],
        "out folder": [text, f"--out={folder}"],
        "no tokenizer": [text, f"--model={golden}/llama/llama2"],
    }
    task = ["experiments.evaluate", "--task=perplexity", f"--model={folder}"]
    return dict(zip(commands, run_commands([[*task, *flags] for flags in commands.values()]), strict=True))


def test_results_are_in_the_agreed_form(results, folder) -> None:
    written = {
        name: json.loads((folder / "out" / f"{name}.json").read_text()) for name in ("none", "ids", "fp4", "half")
    }
    for name, result in written.items():
        assert list(result)[:5] == KEYS and result["task"] == "perplexity", name
        assert result["perplexity"] == pytest.approx(math.exp(result["nll_per_token"]))
        assert result["tokens"] == len(np.load(folder / "ids.npy"))
    assert written["ids"]["nll_per_token"] == pytest.approx(written["none"]["nll_per_token"], abs=1e-6)
    assert (written["none"]["quant"], written["fp4"]["quant"]) == ("none", "fp4+dq")
    assert written["fp4"]["nll_per_token"] != written["none"]["nll_per_token"]
    assert 4 < written["fp4"]["bits_per_param"] < 4.5 and written["none"]["bits_per_param"] == 32
    assert (written["half"]["windows"], written["none"]["windows"]) == (
        math.ceil(written["none"]["tokens"] / 15),
        math.ceil(written["none"]["tokens"] / 31),
    )


def test_a_table_is_printed(results) -> None:
    assert results["no file"]["status"] == 0
    assert results["no file"]["out"].splitlines()[0].split() == [
        "quant",
        "bits/weight",
        "tokens",
        "nats/token",
        "perplexity",
    ]
    assert results["none"]["out"].splitlines()[:2] == results["no file"]["out"].splitlines()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("task", ["unknown task 'squad'", "known: perplexity, heldout, mmlu, glue, rouge, lm-eval"]),
        ("neither", ["one of --text=FILE and --tokens=FILE.npy"]),
        ("stored", ["one of --text=FILE and --tokens=FILE.npy"]),
        ("empty", ["empty.txt is empty"]),
        ("latin", ["latin.txt, line 2: not UTF-8"]),
        ("absent", ["absent.txt cannot be read"]),
        ("foreign", ["token id 400 at [2]", "0 to 399"]),
        ("out folder", ["is a folder"]),
        ("no tokenizer", ["has no tokenizer"]),
    ],
)
def test_mistakes_are_one_line(results, name, named, assert_one_line_error) -> None:
    assert_one_line_error(results[name], named)


def test_folders_stored_in_4_bits_and_without_tokenizer(golden, tmp_path, run_commands) -> None:
    np.save(tmp_path / "ids.npy", np.arange(3, 96, dtype=np.int32))
    task = ["experiments.evaluate", "--task=perplexity", f"--tokens={tmp_path}/ids.npy"]
    stored, quantized, refused = run_commands(
        [
            [*task, f"--model={golden}/bnb4bit/nf4_dq", f"--out={tmp_path}/stored.json"],
            [*task, f"--model={golden}/llama/llama2", "--quant=nf4+dq", f"--out={tmp_path}/quantized.json"],
            [*task, f"--model={golden}/bnb4bit/nf4_dq", "--quant=int4"],
        ]
    )
    assert stored["status"] == quantized["status"] == 0, stored["err"] + quantized["err"]
    here, there = (json.loads((tmp_path / name).read_text()) for name in ("stored.json", "quantized.json"))
    assert here["quant"] == "nf4+dq" and here["tokens"] == 93
    assert here["nll_per_token"] == there["nll_per_token"]
    assert refused["status"] == 2 and "already quantized" in refused["err"]


def test_stories260k(shared_data, tmp_path, run_commands) -> None:
    task = ["experiments.evaluate", "--task=perplexity", f"--model={shared_data}/stories260K"]
    text = f"--text={shared_data}/text/tinystories_slice_197k.txt"
    quants = ("none", "nf4", "int4", "fp4")
    ran = run_commands([[*task, text, f"--quant={quant}", f"--out={tmp_path}/{quant}.json"] for quant in quants])
    assert [result["status"] for result in ran] == [0] * 4, ran
    for quant in quants:
        result = json.loads((tmp_path / f"{quant}.json").read_text())
        assert result["nll_per_token"] == pytest.approx(STORIES[quant], abs=0.005), quant
