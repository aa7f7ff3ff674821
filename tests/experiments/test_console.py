"""`qlora NAME`: what it lists, what it runs, and train and plan without a config file."""

import dataclasses
import json

import pytest

from experiments.support import console
from qlora_jax.api import folders
from tests.api.conftest import ROWS
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

FAST = ["--config.train.steps=4", "--config.lora.rank=16", "--config.train.batch_size=4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", context=256)


@pytest.fixture
def qlora(monkeypatch, run_commands, tmp_path):
    """Runs `qlora ARGUMENTS` in this process."""
    script = tmp_path / "qlora.py"
    script.write_text("import sys\nfrom experiments.support.console import main\nsys.exit(main())\n")
    return lambda *arguments: run_commands([[str(script), *arguments]])[0]


def test_every_command_is_listed_with_a_sentence(qlora):
    listed = qlora()
    assert listed == qlora("--help") and listed["status"] == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in listed["out"].splitlines() if line[:2] == "  "}
    assert set(lines) == set(console.commands()) and {"train", "plan", "judge"} <= set(lines)
    assert all(len(text) > 10 and "python -m" not in text for text in lines.values())
    assert all(len(line) <= 100 for line in listed["out"].splitlines())


def test_an_unknown_command_names_the_nearest(qlora):
    result = qlora("trian", "--x")
    assert result["status"] == 2 and result["err"] == "error: qlora trian: no such command; did you mean qlora train?\n"
    assert "there are train, generate" in qlora("zzzz")["err"]


def test_a_command_runs_under_its_name(qlora):
    assert "--workdir" in qlora("train", "--help")["out"]
    wrong = qlora("bench-kernels", "--zzz")
    assert wrong["status"] == 2 and "unknown flag --zzz" in wrong["err"]


def test_train_from_model_and_data(qlora, monkeypatch, tmp_path, checkpoint):
    monkeypatch.setattr(folders, "RUNS", tmp_path / "runs")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["train", f"--model={checkpoint}", f"--data={data}", *FAST]
    first = qlora(*command)
    assert first["status"] == 0, first["err"]
    run = tmp_path / "runs" / "model-d"
    assert f"run: {run}" in first["out"] and "is read as alpaca" in first["out"]
    assert f"qlora generate --model={checkpoint}" in first["out"] and "--template=alpaca" in first["out"]
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["packing"] and config["train"]["steps"] == 4
    again = qlora(*command)
    assert again["status"] == 0 and "finished" in again["out"]
    data.write_text(data.read_text() + json.dumps(ROWS[0] | {"output": "new"}) + "\n")
    other = qlora(*command, "--config.train.steps=1")
    assert other["status"] == 0 and (tmp_path / "runs" / "model-d-2" / "summary.json").is_file()
    assert json.loads((run / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["missing flag --model=DIR_OR_NAME and --data=FILE, or --config=FILE", "configs/alpaca.py"]),
        (["--model=quickstart"], ["missing flag --data=FILE, or --config=FILE"]),
        (["--config=configs/quickstart.py"], ["missing flag --workdir="]),
        (["--model=quickstart", "--data=absent.jsonl"], ["absent.jsonl: no such file"]),
        (["--model=quickstart", "--data=quickstart", "--config.train.step=3"], ["did you mean --config.train.steps?"]),
        (["--modle=quickstart"], ["did you mean --model?"]),
    ],
)
def test_mistakes_are_one_line(qlora, assert_one_line_error, arguments, words):
    assert_one_line_error(qlora("train", *arguments), words)


def test_plan_from_a_model(qlora, checkpoint, tmp_path, monkeypatch):
    """In Python and by the command the same is planned; it is compiled once."""
    import qlora_jax as qj
    from qlora_jax.api import plan as api
    from qlora_jax.planning import plan as planning

    planned = []

    def plan_once(config, gpu, *rest):
        if not planned:
            as_here = dataclasses.replace(gpu, is_here=True)  # which compiles sooner
            planned.append((config.to_dict(), gpu, real(config, as_here, *rest)))
        assert planned[0][:2] == (config.to_dict(), gpu)
        return planned[0][2]

    real = planning.make_plan
    monkeypatch.setattr(api, "make_plan", plan_once)
    monkeypatch.setattr(planning, "make_plan", plan_once)
    report = qj.plan(checkpoint, gpu="rtx4090", steps=10)
    out = tmp_path / "plan.json"
    result = qlora("plan", f"--model={checkpoint}", "--gpu=rtx4090", "--config.train.steps=10", f"--out={out}")
    assert result["status"] == 0, result["err"]
    assert report.fits and report.to_json() == json.loads(out.read_text())
    assert repr(report).strip() in result["out"] and "it fits" in repr(report)
    with pytest.raises(AttributeError, match="device_peak_bytes"):
        report.nothing  # noqa: B018
    with pytest.raises(qj.InputError, match="rtx4090"):
        qj.plan(checkpoint, gpu="rtx4091")
