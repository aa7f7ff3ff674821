"""What a finished run says, and that its next commands run as they stand."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configs import base
from experiments.support.command import quoted
from experiments.support.finished import finished, prompt_flags
from qlora_jax.generate.trained import template_of, write_template
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished run")  # the blank must survive copying
    write_tiny_checkpoint(folder / "base", context=512)
    rows = [{"instruction": f"say {word}", "output": word} for word in ("one", "two", "three", "four", "five", "six")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(folder, run_commands) -> dict:
    settings = {
        "model.path": folder / "base", "model.compute_dtype": "float32", "data.path": folder / "rows.jsonl",
        "data.eval_examples": 2, "lora.rank": 2, "lora.targets": "q_proj,down_proj", "train.steps": 3,
        "train.batch_size": 2, "train.grad_accum": 1, "eval.every": 2, "quant.block_size": 32,
    }  # fmt: skip
    config = ["--config=configs/base.py", *(f"--config.{key}={value}" for key, value in settings.items())]
    (result,) = run_commands([["experiments.train", *config, f"--workdir={folder / 'run'}"]])
    assert result["status"] == 0, result["err"]
    return result


def next_commands(out: str) -> list[list[str]]:
    lines = out[out.index("\nnext:\n") :].splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("  ") and not line.strip().startswith("#")]
    return [line[line.index("-m") + 1 :] for line in words]


def test_it_says_what_it_made(trained, folder):
    out = trained["out"]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert f"loss training {summary['final_train_loss']:.4f}, held out {summary['final_eval_loss']:.4f}" in out
    assert re.search(r"done: 3 steps in \d+ s; .* tokens/s", out)
    for name in ("adapter", "checkpoints", "metrics.jsonl", "summary.json", "config.json"):
        assert re.search(rf"  {re.escape(str(folder / 'run' / name))} +[\d.]+ (KiB|MiB|bytes)  \w", out), name


def test_a_log_has_lines_of_progress(trained):
    lines = [line for line in trained["err"].splitlines() if line.startswith("training: ")]
    assert re.fullmatch(r"training: step 1 of 3 \(33%\), loss \d+\.\d{4}, \d+\.\d\d GiB host", lines[0])
    assert "\r" not in trained["err"] and lines[-1].startswith("training: step 3 of 3 (100%), loss")
    assert "step 2: held-out loss" in trained["out"]


def test_the_next_commands_run(trained, folder, run_commands):
    generate, evaluate, export = next_commands(trained["out"])
    assert generate[0] == "experiments.generate" and "--template=alpaca" in generate and "--block_size=32" in generate
    results = run_commands([[*generate, "--prompt=say one", "--max_new_tokens=2"], evaluate, export])
    assert [result["status"] for result in results] == [0, 0, 0], [result["err"][-500:] for result in results]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert f"with the adapter        {summary['final_eval_loss']:8.4f}" in results[1]["out"]
    assert (folder / "run-merged" / "model.safetensors").exists()


def test_evaluating_a_run_takes_nothing_that_contradicts_it(folder, trained, run_commands, assert_one_line_error):
    evaluate = ["experiments.evaluate", "--task=heldout", f"--model={folder / 'base'}"]
    none, quant = run_commands([evaluate, [*evaluate, f"--workdir={folder / 'run'}", "--quant=nf4"]])
    assert_one_line_error(none, ["--workdir=RUN"])
    assert_one_line_error(quant, ["--quant does not go with --task=heldout"])


@pytest.mark.parametrize(
    "format, flags",
    [
        ("dolly", ["--template=alpaca"]),
        ("oasst1", ["--template=guanaco"]),
        ("messages", ["--template=guanaco"]),  # this model has no template of its own
        ("hh-rlhf", ["--template=plain", "--prompt=\n\nHuman: Name three primes.\n\nAssistant:"]),
        ("self-instruct", ["--template=plain", "--prompt=Name three primes.\nOutput: "]),
        ("longform", ["--template=plain", "--prompt=Name three primes."]),
    ],
)
def test_the_template_is_what_was_trained(format, flags, tmp_path):
    config = base.get_config()
    config.data.format = format
    (tmp_path / "adapter").mkdir()
    write_template(tmp_path / "adapter", template_of([{"format": format, "chat": False}]))
    assert prompt_flags(config, tmp_path) == flags


def test_without_held_out_examples_mmlu_is_asked(folder):
    config = base.get_config()
    config.model.path, config.data.batches = str(folder / "base"), "b.npy"
    config.model.revision, config.quant.format = "v1", "none"
    summary = json.loads((folder / "run" / "summary.json").read_text()) | {"final_eval_loss": None}
    said = finished(config, Path("runs/x"), summary, 7500.0)
    generate, evaluate, _ = next_commands(said)
    assert evaluate[1:3] == ["--task=mmlu", "--mmlu_data=cais/mmlu"] and "--quant=none" in evaluate
    assert "--revision=v1" in generate and "--prompt=Once upon a time" in generate and "2 h 5 min" in said


@pytest.mark.parametrize("text", ["a b", "it's", "a\nb", "$HOME", "", "back\\slash\n'quote'"])
def test_a_shell_reads_what_was_meant(text):
    done = subprocess.run(["bash", "-c", f"printf %s {quoted(f'--prompt={text}')}"], capture_output=True, text=True)
    assert done.stdout == f"--prompt={text}"
