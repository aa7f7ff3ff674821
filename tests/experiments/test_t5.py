"""An encoder-decoder through the commands: trained on tasks, exported, measured; mistakes in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.data.super_natural_folder import a_task, write_folder
from tests.t5 import write_tiny_t5

pytestmark = pytest.mark.quick_compile
CONFIG = "configs/t5_sni.py"
SMALL = (
    "model.compute_dtype=float32", "model.remat=none", "lora.rank=4", "lora.dropout=0.1", "data.max_source_len=96",
    "data.max_target_len=16", "data.eval_examples=0", "data.pad_to_multiple_of=112", "optimizer.learning_rate=3e-2",
    "optimizer.max_grad_norm=2.0", "train.batch_size=4", "train.steps=10", "train.checkpoint_every=5",
)  # fmt: skip
MISTAKES = {
    "targets": (("lora.targets=qq",), ["'qq' matches no linear layer; known: q, k, v, o, wi, wo, or"]),
    "format": (("data.format=super-natural",), ["unknown data.format 'super-natural'"]),
    "packing": (("data.packing=True",), ["data.packing is True", "encoder-decoder"]),
    "remat": (("model.remat=selective",), ["model.remat is 'selective'", "set model.remat=block"]),
    "key": (("data.max_source_length=96",), ["data.max_source_len"]),
}


@pytest.fixture(scope="module")
def results(run_commands, tmp_path_factory):
    out: Path = tmp_path_factory.mktemp("t5")
    model = str(write_tiny_t5(out / "model"))
    folder = write_folder(out / "ni", {"train": [a_task(20), a_task(8)], "test": [a_task(3), a_task(2)]})
    lists = folder / "splits" / "default"
    given = [f"--config.{key}" for key in (*SMALL, "lora.targets=q", f"model.path={model}")]
    given += [f"--config.data.path={lists}/train_tasks.txt"]
    run = f"{out}/run"
    rouge = ["--task=rouge", f"--rouge_data={lists}/test_tasks.txt", "--source_len=96", "--new_tokens=8"]
    commands = {
        "train": ["experiments.train", f"--config={CONFIG}", *given, f"--workdir={run}"],
        "export": ["experiments.export", f"--workdir={run}", f"--out={out}/merged", "--merge"],
        "resumed": ["experiments.train", f"--config={CONFIG}", *given, f"--workdir={out}/cut"],
        "rouge": [
            "experiments.evaluate", *rouge, f"--model={out}/merged", "--quant=none", f"--out={out}/rouge.json",
        ],
        "perplexity": ["experiments.evaluate", "--task=perplexity", f"--model={model}", "--text=README.md"],
        "no data": ["experiments.evaluate", "--task=rouge", f"--model={model}"],
    }  # fmt: skip
    for name, (keys, _) in MISTAKES.items():
        own = [f"--config.{key}" for key in keys]
        commands[name] = ["experiments.train", f"--config={CONFIG}", *given, *own, f"--workdir={out}/never"]
    first = run_commands([commands.pop("train")])
    shutil.copytree(run, out / "cut")  # as if it had been killed behind the checkpoint of step 5
    for left in ("summary.json", "adapter", "checkpoints/10"):
        path = out / "cut" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    commands = {"train": [], **commands}
    found = [*first, *run_commands([command for command in commands.values() if command])]
    return dict(zip(commands, found, strict=True)) | {"out": out}


def test_it_learns_its_tasks(results):
    assert results["train"]["status"] == 0, results["train"]["err"]
    said = results["train"]["out"]
    assert "(super-natural-instructions): 2 rows, 28 examples" in said
    assert "of each task at most 100 instances, each with its definition and at most 2 examples" in said
    losses = [json.loads(line)["loss"] for line in (results["out"] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 10 and sum(losses[-3:]) < 0.9 * sum(losses[:3])
    said = json.loads((results["out"] / "run" / "adapter" / "adapter_config.json").read_text())
    assert said["task_type"] == "SEQ_2_SEQ_LM" and said["target_modules"] == ["q"]


def test_a_resumed_run_is_the_same_bit_for_bit(results):
    assert results["resumed"]["status"] == 0, results["resumed"]["err"]
    assert "run: resumed, 5 of 10 steps done" in results["resumed"]["out"]
    files = [results["out"] / name / "adapter" / "adapter_model.safetensors" for name in ("run", "cut")]
    whole, cut = map(load_file, files)
    assert whole.keys() == cut.keys() and all(np.array_equal(whole[key], cut[key]) for key in whole)


def test_rouge(results):
    assert results["rouge"]["status"] == 0, results["rouge"]["err"]
    found = json.loads((results["out"] / "rouge.json").read_text())
    assert found["questions"] == 5 and {*found["tasks"]} == {"test_0", "test_1"}
    assert found["tasks"]["test_0"]["questions"] == 3 and 0 <= found["rouge_l"] <= 100
    assert found["quant"] == "none" and "ROUGE-L" in results["rouge"]["out"]


def test_export(results):
    assert results["export"]["status"] == 0, results["export"]["err"]
    names = set(os.listdir(results["out"] / "merged"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "spiece.model"} <= names


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, results, assert_one_line_error):
    assert_one_line_error(results[name], MISTAKES[name][1])


def test_what_a_decoder_is_for_is_refused(results, assert_one_line_error):
    assert_one_line_error(results["perplexity"], ["an encoder-decoder (T5)", "--task=rouge"])
    assert_one_line_error(results["no data"], ["--task=rouge takes --rouge_data=FILE"])
