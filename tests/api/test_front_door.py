"""The five lines: load, finetune, generate, save; the base is read once, and a second run goes on or goes elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.train import setup
from tests.api.conftest import ROWS, SETTINGS

pytestmark = pytest.mark.quick_compile

REPOSITORY = Path(__file__).resolve().parents[2]
hidden = jax.jit(lambda model, tokens: model(tokens)[0])
GREEDY = {"temperature": 0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def made(home, checkpoint):
    """The model, the run, and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        model = qj.load(checkpoint, quant="nf4+dq")
        said: list[str] = []
        patch.setattr(setup, "load_model", lambda *_: pytest.fail("the base was loaded again"))
        run = qj.finetune(model, ROWS, say=said.append, **SETTINGS)
    return model, run, said


@pytest.fixture
def at_home(monkeypatch, home):
    monkeypatch.chdir(home)


def test_the_run_is_where_it_says(made, home):
    model, run, said = made
    folder = home / run.workdir
    assert run.workdir.parent.name == "runs" and run.workdir.name.startswith("model-rows-")
    assert json.loads((folder / "config.json").read_text()) == run.config
    assert run.config["train"] | {"steps": 4, "batch_size": 4} == run.config["train"]
    assert (run.config["lora"]["rank"], run.config["data"]["format"]) == (16, "alpaca")
    assert run.config["data"]["packing"] and run.config["train"]["grad_accum"] == "auto"
    assert len(run.losses) == 4 and run.losses[-1] < run.losses[0]
    assert "4 steps" in repr(run) and str(run.workdir) in repr(run)
    assert any("is read as alpaca" in line for line in said)


def test_the_model_answers_as_it_was_trained(made, at_home):
    model, run, _ = made
    assert model.template == "alpaca" and model.adapter == run.adapter.absolute()
    assert "template 'alpaca'" in repr(model) and "nf4 + double quantization" in repr(model)
    answer = model.generate("Say hi.", **GREEDY)
    assert isinstance(answer, str)
    asked = [{"instruction": "Say hi."}, 8 * "Say ho. "]  # as long as the notebook's
    assert model.generate(asked, **GREEDY)[0] == answer
    assert model.generate(asked[0], **GREEDY) == answer


def test_the_base_stays_as_it_was_read(made, checkpoint):
    model = made[0]
    fresh = qj.load(checkpoint, quant="nf4+dq")
    tokens = np.arange(3, 11)[None]
    assert np.array_equal(hidden(model.base.model, tokens), hidden(fresh.base.model, tokens))
    assert not np.array_equal(hidden(model.llama, tokens), hidden(fresh.base.model, tokens))


def test_the_saved_adapter_is_the_model(made, at_home, checkpoint, run_commands, tmp_path):
    model, run, _ = made
    expected = model.generate("Say hi.", **GREEDY)
    folder = model.save_adapter(tmp_path / "adapter")
    again = qj.load(checkpoint, quant="nf4+dq", adapter=folder)
    assert again.template == "alpaca" and again.generate("Say hi.", **GREEDY) == expected
    with pytest.raises(qj.InputError, match="not empty"):
        model.save_adapter(folder)
    command = ["experiments.generate", f"--model={checkpoint}", "--quant=nf4+dq", f"--adapter={folder}"]
    command += ["--temperature=0", "--max_new_tokens=6"]
    as_long = 10 * "Say hi. "  # as the template makes the other, so that both are one program
    other = [*command, f"--prompt={as_long}"]
    asked, plain = run_commands([[*command, "--prompt=Say hi.", "--template=alpaca"], other])
    assert asked["out"] == expected + "\n"
    assert "trained with the template alpaca" in plain["err"] and "trained with" not in asked["err"]


def test_a_second_call_finds_its_run_finished(made, at_home):
    model, run, _ = made
    said: list[str] = []
    again = qj.finetune(model, iter(ROWS), say=said.append, **SETTINGS)
    assert again.workdir == run.workdir and again.losses == run.losses
    assert any("finished" in line for line in said)


def test_other_settings_or_data_go_elsewhere(made, home, at_home, tmp_path):
    from qlora_jax.api.folders import choose_workdir
    from qlora_jax.api.names import set_keys
    from qlora_jax.base import get_config
    from qlora_jax.settings import flatten, resolved

    _, run, _ = made
    config = get_config()
    set_keys(config, flatten(run.config))
    assert choose_workdir(config, resolved(config)) == run.workdir
    copy = tmp_path / "elsewhere" / (run.config["data"]["path"].rpartition("/")[2])
    copy.parent.mkdir()
    copy.write_bytes((home / run.config["data"]["path"]).read_bytes())
    config.data.path = str(copy)  # the same rows under another name
    assert choose_workdir(config, resolved(config)) == run.workdir
    copy.write_text(copy.read_text() + json.dumps(ROWS[0]) + "\n")
    assert choose_workdir(config, resolved(config)).name == f"{run.workdir.name}-2"
    copy.write_bytes((home / run.config["data"]["path"]).read_bytes())
    set_keys(config, {"steps": 5})
    assert choose_workdir(config, resolved(config)).name == f"{run.workdir.name}-2"


def test_the_plot_shows_every_step(made, tmp_path):
    figure = made[1].plot()
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3, 4] and list(line.get_ydata()) == made[1].losses
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_merge_writes_a_whole_checkpoint(made, at_home, tmp_path):
    merged = qj.load(made[0].merge(tmp_path / "merged", dtype="float32"), quant="none")
    tokens = np.arange(3, 11)[None]
    np.testing.assert_allclose(hidden(merged.llama, tokens), hidden(made[0].llama, tokens), atol=1e-4)


def test_a_chat_answers_and_ends(made, monkeypatch, capsys):
    lines = iter(["Say hi.\n", "/quit\n", "never read\n"])
    monkeypatch.setattr(sys.stdin, "readline", lambda: next(lines), raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    made[0].chat(temperature=0, max_new_tokens=6)
    assert capsys.readouterr().out.strip() == made[0].generate("Say hi.", **GREEDY)
    assert next(lines) == "never read\n"


def test_the_hub_gets_the_adapter_and_nothing_else(made, at_home, monkeypatch):
    import huggingface_hub

    calls = []

    class Hub:
        endpoint = "https://hub"

        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert made[0].push_adapter("me/mine") == "https://hub/me/mine"
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == made[1].adapter.absolute()
    assert "qlora_jax_prompts.json" in calls[1]["allow_patterns"]
    with pytest.raises(qj.InputError, match="owner/name"):
        made[0].push_adapter("mine")

    def refused(self, repo, **options):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Hub, "create_repo", refused)
    with pytest.raises(qj.InputError, match="me/mine: 401 Unauthorized; .*HF_TOKEN"):
        made[0].push_adapter("me/mine")


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (ROWS, {"stepz": 3}, "stepz: no such setting; did you mean train.steps"),
        (ROWS, {"lr": 3}, "did you mean optimizer.learning_rate"),
        (ROWS, {"seed": 3}, "data.seed and train.seed"),
        (ROWS, {"steps": "3"}, "train.steps is '3'; expected a whole number"),
        (ROWS, {"quant.format": "fp4"}, "quant.format is 'nf4' in the loaded model"),
        (ROWS, {"data.path": "x"}, "data.path and data are both given"),
        ([], {}, "data has no rows"),
        ([1], {}, "row 1 of data is int"),
        ([{"instruction": float("nan")}], {}, "row 1 .* instruction"),
        ([{"instruction": object()}], {}, "a object is no text"),
        ({"train": ROWS}, {}, r"data\['train'\]"),
        ([{"x": 1}], {}, "no data.format reads its rows"),
        (7, {}, "data is int"),
        ("absent.jsonl", {}, "absent.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line_and_make_no_run(made, at_home, home, data, settings, words):
    runs = {path for path in (home / "runs").iterdir() if path.is_dir()}
    with pytest.raises(qj.InputError, match=words) as error:
        qj.finetune(made[0], data, say=lambda line: None, **settings)
    assert "\n" not in str(error.value)
    assert {path for path in (home / "runs").iterdir() if path.is_dir()} == runs
    assert not list((home / "runs").glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "absent"}, "no such folder .*quickstart comes with the package"),
        ({"quant": "nf5"}, "quant is 'nf5'; expected one of none, nf4"),
        ({"adapter": "absent"}, "absent: no such folder"),
        ({"compute_dtype": "float8"}, "model.compute_dtype is 'float8'"),
    ],
)
def test_loading_says_what_is_wrong(checkpoint, arguments, words):
    with pytest.raises(qj.InputError, match=words):
        qj.load(**({"model": checkpoint} | arguments))


def test_without_an_adapter_nothing_is_saved(checkpoint, tmp_path):
    model = qj.load(checkpoint)
    assert model.template == "plain" and "no adapter" in repr(model)
    for call in (model.save_adapter, model.merge, model.push_adapter):
        with pytest.raises(qj.InputError, match="the model has no adapter"):
            call(tmp_path / "out")


def test_importing_costs_nothing():
    script = "import sys, qlora_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules); dir(qlora_jax)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)
    assert {"load", "finetune", "plan", "quantize"} <= set(dir(qj))
    with pytest.raises(AttributeError, match="nothing"):
        qj.nothing  # noqa: B018
