"""Added tokens through the commands: trained, measured, generated with, exported, merged, and typed wrongly."""

import json

import numpy as np
import pytest

from qlora_jax.text.tokenizer import Tokenizer
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny_checkpoint(folder / "base")
    rows = [{"input": f"say <yes> {word}", "output": "<yes>"} for word in ("one", "two", "three", "four")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("say <yes> one<yes> " * 8)
    return folder


@pytest.fixture(scope="module")
def results(folder, run_commands):
    settings = {
        "model.path": folder / "base", "model.compute_dtype": "float32", "data.path": folder / "rows.jsonl",
        "data.format": "input-output", "data.eval_examples": 0, "data.added_tokens": "<yes>", "lora.rank": 2,
        "lora.targets": "q_proj", "lora.dropout": 0.0, "train.steps": 12, "train.batch_size": 4, "train.grad_accum": 1,
        "data.pad_to_multiple_of": 32, "optimizer.learning_rate": 0.05, "optimizer.max_grad_norm": 0.0,
    }  # fmt: skip
    config = ["--config=configs/base.py", *(f"--config.{key}={value}" for key, value in settings.items())]
    model, adapter = f"--model={folder / 'base'}", f"--adapter={folder / 'run' / 'adapter'}"
    quant, text = "--quant=nf4+dq", f"--text={folder / 'text.txt'}"
    measure = ["experiments.evaluate", "--task=perplexity", text]
    export = ["experiments.export", f"--workdir={folder / 'run'}"]
    commands = {
        "data": ["experiments.data", *config, "--show=1"],
        "train": ["experiments.train", *config, f"--workdir={folder / 'run'}"],
        "generate": ["experiments.generate", model, adapter, quant, "--prompt=say <yes> two", "--temperature=0",
                     "--max_new_tokens=3"],
        "adapted": [*measure, model, adapter, quant, f"--out={folder / 'adapted.json'}"],
        "plain": [*measure, model, quant, f"--out={folder / 'plain.json'}"],
        "exported": [*export, f"--out={folder / 'exported'}"],
        "merged": [*export, "--merge", "--dtype=float32", f"--out={folder / 'merged'}"],
        "of merged": [*measure, f"--model={folder / 'merged'}", f"--out={folder / 'merged.json'}"],
        "twice": ["experiments.train", *config, "--config.data.added_tokens=<yes>", f"--workdir={folder / 'no'}"],
        "typo": ["experiments.train", *config, "--config.lora.modules_to_save=embed", f"--workdir={folder / 'no'}"],
    }  # fmt: skip
    return dict(zip(commands, run_commands(list(commands.values())), strict=True))


def test_all_end_well(results):
    for name, result in results.items():
        assert result["status"] == (2 if name in ("twice", "typo") else 0), f"{name}: {result['err'][-2000:]}"


def test_what_is_said(results):
    said = "tokens: added '<yes>' = 400, '<pad>' = 401; pad is '<pad>'; embedding and head grow from 400 to 402 rows"
    assert said in results["data"]["out"] and said in results["train"]["out"]
    assert "embed_tokens and lm_head train whole (lora.modules_to_save)" in results["train"]["out"]
    assert "<yes>" in results["data"]["out"].splitlines()[1]


def test_the_token_is_generated(results):
    assert results["generate"]["out"].startswith("say <yes> two<yes>")


def test_the_adapters_own_tokenizer_and_rows_are_used(folder, results):
    adapted, plain, merged = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("adapted", "plain", "merged")
    )
    assert adapted["tokens"] < plain["tokens"]  # "<yes>" is one token
    assert adapted["tokens"] == merged["tokens"]
    np.testing.assert_allclose(adapted["nll_per_token"], merged["nll_per_token"], rtol=1e-4)


def test_tokenizers_go_along(folder, results):
    for name in ("exported", "merged"):
        tokenizer = Tokenizer.from_folder(folder / name, folder / "base")
        assert (tokenizer.id_of("<yes>"), tokenizer.id_of("<pad>"), tokenizer.eos_id) == (400, 401, 2)
    assert json.loads((folder / "merged" / "config.json").read_text())["vocab_size"] == 402


def test_mistakes_are_one_line(results, assert_one_line_error):
    assert_one_line_error(results["twice"], ["data.added_tokens", "'<yes>' stands there twice"])
    assert_one_line_error(results["typo"], ["lora.modules_to_save has 'embed'", "embed_tokens, lm_head"])
