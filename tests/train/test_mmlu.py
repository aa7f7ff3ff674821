"""MMLU during training: its accuracies are logged, and not one bit of the run changes."""

import json

import pytest
from safetensors.numpy import load_file

from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu import accuracy as mmlu
from qlora_jax.evaluate.mmlu.data import load_questions
from qlora_jax.evaluate.mmlu.prompts import make_prompts
from qlora_jax.evaluate.scoring import option_logits_of
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.io.peft import load_adapter
from qlora_jax.settings import resolved
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import loop
from qlora_jax.train.checks import check_config
from qlora_jax.train.loop import finetune
from tests.evaluate.mmlu.mmlu_files import write_checkpoint, write_owners_folder

pytestmark = pytest.mark.quick_compile


@pytest.fixture
def config(tiny_config, tmp_path):
    tiny_config.model.path = str(write_checkpoint(tmp_path / "model", context=256))
    tiny_config.train.steps = 4
    tiny_config.lora.dropout = 0.3
    return tiny_config


def train(config, path):
    lines: list[str] = []
    summary = finetune(config, resolved(config), path, say=lines.append)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return summary, rows, "\n".join(lines)


def test_questions_on_the_way_change_no_bit(config, tmp_path, monkeypatch):
    data = write_owners_folder(tmp_path / "mmlu")
    _, rows, _ = train(config, tmp_path / "without")
    asking = config.copy_and_resolve_references()
    asking.eval.mmlu_data, asking.eval.mmlu_every, asking.eval.mmlu_shots = str(data), 2, 0
    asking.eval.mmlu_batch_size = 9
    monkeypatch.setattr(loop, "memory_limit", lambda: 2**40)  # programs are compiled before the state is placed
    summary, asked_rows, said = train(asking, tmp_path / "with")
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("without", "with"))
    assert one.keys() == other.keys() and all(one[key].tobytes() == other[key].tobytes() for key in one)
    assert [row["loss"] for row in rows] == [row["loss"] for row in asked_rows if "loss" in row]

    found = [row for row in asked_rows if "mmlu_accuracy_subjects" in row]
    assert [row["step"] for row in found] == [0, 2] and all(row["mmlu_questions"] == 9 for row in found)
    assert "mmlu: 9 questions of 3 subjects, 0 shots; all prompts fit the context" in said
    # the end is what `evaluate` finds with the adapter that was written
    model = load_model(tmp_path / "model", QuantSpec("nf4", 64, True), "float32")
    load_adapter(model, tmp_path / "with" / "adapter")
    questions = load_questions(str(data), "val", 0)
    prompts = make_prompts(questions, 0, Tokenizer.from_folder(config.model.path), 256, 1024)
    expected = mmlu.results(questions.asked, mmlu.answer(option_logits_of(model), prompts, 9))
    assert summary["final_mmlu_accuracy_subjects"] == expected["accuracy_subjects"]
    assert summary["final_mmlu_accuracy_questions"] == expected["accuracy_questions"]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("mmlu_every", 5, "eval.mmlu_every is set, but eval.mmlu_data is empty"),
        ("mmlu_every", -1, "eval.mmlu_every is -1; expected 0 or more"),
        ("mmlu_shots", -1, "eval.mmlu_shots is -1"),
        ("mmlu_split", "train", "eval.mmlu_split is 'train'; expected test or val or dev"),
        ("mmlu_batch_size", 0, "eval.mmlu_batch_size is 0; expected at least 1"),
    ],
)
def test_bad_values_are_said_before_anything_is_read(tiny_config, key, value, named):
    tiny_config.eval[key] = value
    with pytest.raises(InputError, match=named):
        check_config(tiny_config)


def test_bad_data_is_said_before_the_model_is_loaded(config, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    config.eval.mmlu_data = str(tmp_path / "absent.json")
    with pytest.raises(InputError, match="absent.json: no such file"):
        train(config, tmp_path / "run")
