"""Commands with encoders: rows measured, shown and planned; what an encoder cannot do is one line."""

import json

import pytest

from tests.roberta import write_glue, write_tiny_roberta

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_commands, golden) -> dict:
    out = tmp_path_factory.mktemp("glue")
    model, glue = write_tiny_roberta(out / "model", labels=2), write_glue(out / "rows")
    rte, cola, sts = (glue / name for name in ("RTE/dev.tsv", "CoLA/train.tsv", "STS-B/train.tsv"))
    (out / "cola.json").write_text(json.dumps({"task": "glue", "glue_task": "cola", "score": 0.5}))
    evaluate = ["experiments.evaluate", "--task=glue", f"--model={model}"]
    shown = ["experiments.data", "--config=configs/roberta_glue.py", f"--config.model.path={model}", "--show=1",
             "--config.data.max_source_len=40", "--config.data.eval_path="]  # fmt: skip
    commands = {
        "rte": [*evaluate, f"--glue_data={rte},{glue / 'RTE/train.tsv'}", f"--out={out}/rte.json"],
        "mean": [*evaluate, f"--glue_results={out}/rte.json,{out}/cola.json", f"--out={out}/mean.json"],
        "show classes": [*shown, f"--config.data.path={rte}"],
        "show numbers": [*shown, f"--config.data.path={sts}"],
        "two tasks": [*evaluate, f"--glue_data={rte},{cola}"],
        "other head": [*evaluate, f"--glue_data={sts}"],
        "no data": evaluate,
        "a decoder": ["experiments.evaluate", "--task=glue", f"--glue_data={rte}", f"--model={golden}/llama/llama1"],
        "text": ["experiments.evaluate", "--task=perplexity", f"--model={model}", f"--text={rte}"],
        "written": ["experiments.generate", f"--model={model}", "--prompt=hello"],
    }
    return dict(zip(commands, run_commands(list(commands.values())), strict=True)) | {"out": out}


def test_rows_are_measured(results):
    for name in ("rte", "mean"):
        assert results[name]["status"] == 0, results[name]["err"]
    found = json.loads((results["out"] / "rte.json").read_text())
    assert found["glue_task"] == "rte" and found["quant"] == "none"
    assert [one["examples"] for one in found["sets"]] == [8, 32]
    lines = [json.loads(line) for line in (results["out"] / "rte.predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and {line["label"] for line in lines} == {"entailment", "not_entailment"}
    right = [line["label"] == line["prediction"] for line in lines[:8]]
    assert sum(right) / 8 == found["sets"][0]["accuracy"] and lines[0]["where"].endswith("dev.tsv, line 2")
    mean = json.loads((results["out"] / "mean.json").read_text())
    assert mean["mean"] == pytest.approx((found["score"] + 0.5) / 2)
    assert "accuracy" in results["rte"]["out"] and "mean" in results["mean"]["out"]


def test_labels_are_shown_by_their_names(results):
    assert "<EOS><EOS>" in results["show classes"]["out"] and "entailment⟧" in results["show classes"]["out"]
    assert "<EOS>⟦1.667⟧" in results["show numbers"]["out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two tasks", "has rows of rte and cola; an adapter is for one"),
        ("other head", "the model's head has 2 labels, and stsb has 1"),
        ("no data", "takes one of --glue_data=FILE and --glue_results"),
        ("a decoder", "this model is a decoder"),
        ("text", "this model is an encoder"),
        ("written", "this model is an encoder"),
    ],
)
def test_mistakes_are_one_line(name, message, results):
    assert results[name]["status"] == 2 and message in results[name]["err"].splitlines()[-1], results[name]
