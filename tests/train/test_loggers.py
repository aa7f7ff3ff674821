"""Metrics go to TensorBoard, Weights & Biases and MLflow, and a resumed run goes on there without a step twice."""

import json
import struct
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from qlora_jax.errors import InputError
from qlora_jax.packs.pack import PackRunner
from qlora_jax.settings import resolved
from qlora_jax.sweep.check import check_points
from qlora_jax.sweep.grid import axis, expand
from qlora_jax.train.loggers import Loggers, check_loggers
from qlora_jax.train.loop import Run, finetune

pytestmark = pytest.mark.quick_compile

PLAIN = {"lora": {"rank": 2, "targets": ["q_proj"]}, "train": {"steps": 4}}


def events(folder: Path) -> list[Event]:
    """Of all files, in the order of their names. A record is its length, a checksum, the event, a checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars by tag as TensorBoard shows them: the start of a session makes it forget its step and later ones."""
    kept: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            kept = defaultdict(list, {tag: [row for row in rows if row[0] < event.step] for tag, rows in kept.items()})
        for value in event.summary.value:
            if value.HasField("simple_value"):
                kept[value.tag].append((event.step, value.simple_value))
    return kept


def hyperparameters(folder: Path) -> str:
    return "".join(str(value.metadata) for event in events(folder) for value in event.summary.value)


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def wandb(monkeypatch) -> types.ModuleType:
    """Keeps what a server would: history by step, of runs by id; takes steps only in order, as W&B does."""
    module = types.ModuleType("wandb")
    module.runs = {}

    class FakeRun:
        def __init__(self):
            self.history, self.summary, self.step, self.exits = {}, {}, 0, []

        def log(self, values, step):
            assert step >= self.step - 1, "W&B drops steps out of order"
            self.history.setdefault(step, {}).update(values)
            self.step = max(self.step, step + 1)

        def finish(self, exit_code):
            self.exits.append(exit_code)

    def init(**options):
        assert options["resume"] == "allow" and not any("key" in name for name in options)
        run = module.runs.setdefault(options["id"], FakeRun())
        run.options = options
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch) -> types.SimpleNamespace:
    """MlflowClient with a server in memory, which keeps every value that it is sent."""
    server = types.SimpleNamespace(runs={}, experiments={})

    class Client:
        def get_experiment_by_name(self, name):
            return server.experiments.get(name)

        def create_experiment(self, name):
            server.experiments[name] = types.SimpleNamespace(experiment_id=name)
            return name

        def create_run(self, experiment, run_name):
            identity = f"run{len(server.runs)}"
            server.runs[identity] = {"params": {}, "metrics": defaultdict(list), "status": "RUNNING", "name": run_name}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

        def update_run(self, identity, status):
            server.runs[identity]["status"] = status

        def log_batch(self, identity, params):
            assert len(params) <= 100
            server.runs[identity]["params"] |= {param.key: param.value for param in params}

        def get_metric_history(self, identity, name):
            return [types.SimpleNamespace(step=step) for step, _ in server.runs[identity]["metrics"][name]]

        def log_metric(self, identity, name, value, step):
            server.runs[identity]["metrics"][name].append((step, value))

        def set_terminated(self, identity, status):
            server.runs[identity]["status"] = status

    module = types.ModuleType("mlflow")
    module.tracking = types.ModuleType("mlflow.tracking")
    module.tracking.MlflowClient = Client
    module.entities = types.ModuleType("mlflow.entities")
    module.entities.Param = lambda key, value: types.SimpleNamespace(key=key, value=value)
    for name in ("mlflow", "mlflow.tracking", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, {"mlflow": module}.get(name) or getattr(module, name.partition(".")[2]))
    return server


def test_a_run_that_is_cut_and_resumed(tiny_config, tmp_path, monkeypatch, wandb, mlflow):
    """Cut after step 5, whose row is out, with a checkpoint at step 4."""
    tiny_config.train.loggers = ("tensorboard", "wandb", "mlflow")
    workdir = tmp_path / "run"
    train = lambda: finetune(tiny_config, resolved(tiny_config), workdir, say=lambda line: None)  # noqa: E731
    original = Run._step

    def cut(self, step):
        if step == 5:
            raise RuntimeError("power cut")
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train()
    assert [step for step, _ in shown(workdir / "tensorboard")["loss"]] == [1, 2, 3, 4, 5]
    (run,), (served,) = wandb.runs.values(), mlflow.runs.values()
    assert run.exits == [1] and served["status"] == "KILLED"
    summary = train()
    losses = [(row["step"], row["loss"]) for row in rows(workdir)]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]

    scalars = shown(workdir / "tensorboard")
    assert scalars["loss"] == [(step, pytest.approx(loss)) for step, loss in losses]
    assert [step for step, _ in scalars["learning_rate"]] == [1, 2, 3, 4, 5, 6]
    assert scalars["summary/final_train_loss"] == [(7, pytest.approx(summary["final_train_loss"]))]
    assert "lora.rank" in hyperparameters(workdir / "tensorboard")

    assert list(wandb.runs.values()) == [run] and run.exits == [1, 0]
    assert [(step, values["loss"]) for step, values in sorted(run.history.items())] == losses
    assert run.summary["final_train_loss"] == summary["final_train_loss"]
    assert run.options["config"]["lora"]["rank"] == 2 and run.options["project"] == "qlora_jax"

    assert list(mlflow.runs.values()) == [served] and served["status"] == "FINISHED" and served["name"] == "run"
    assert served["metrics"]["loss"] == losses
    assert served["metrics"]["summary/steps"] == [(6, 6)]
    assert served["params"]["lora.rank"] == "2" and served["params"]["train.loggers"].startswith('["tensorboard"')

    train()  # of a run that has ended: its files are written again
    again = shown(workdir / "tensorboard")
    assert all(again[tag] == scalars[tag] for tag in scalars if "/" not in tag)
    assert {tag: len(found) for tag, found in again.items()} == {tag: len(found) for tag, found in scalars.items()}
    assert served["metrics"]["loss"] == losses and len(run.history) == 6
    assert set(json.loads((workdir / "loggers.json").read_text())) == {"wandb", "mlflow"}


def test_without_loggers_nothing_is_written(tmp_path):
    loggers = Loggers((), tmp_path, PLAIN, 0, print)
    loggers.log({"step": 1, "loss": 1.0})
    loggers.finish({"steps": 1})
    loggers.close(done=True)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_all_numbers(tmp_path):
    loggers = Loggers(("tensorboard",), tmp_path, PLAIN, 0, print)
    loggers.log({"step": 1, "loss": float("nan"), "grad_norm": 2.0, "status": "not_finite", "flag": True})
    loggers.close(done=False)
    assert shown(tmp_path / "tensorboard") == {"grad_norm": [(1, 2.0)]}


def test_what_was_logged_is_on_disk_at_once(tmp_path):
    loggers = Loggers(("tensorboard",), tmp_path, PLAIN, 0, print)
    loggers.log({"step": 1, "loss": 3.0})
    assert shown(tmp_path / "tensorboard")["loss"] == [(1, 3.0)]  # not closed: as after kill -9


def test_one_that_fails_under_way_is_said_once(tmp_path, mlflow, monkeypatch):
    said: list[str] = []
    loggers = Loggers(("mlflow", "tensorboard"), tmp_path, PLAIN, 0, said.append)

    def down(*_, **__):
        raise ConnectionError("https://user:secret@host/api is down")

    monkeypatch.setattr(sys.modules["mlflow.tracking"].MlflowClient, "log_metric", down)
    for step in (1, 2):
        loggers.log({"step": step, "loss": 1.0})
    assert len(said) == 1 and "mlflow failed" in said[0] and "secret" not in said[0]
    assert len(shown(tmp_path / "tensorboard")["loss"]) == 2


def test_mistakes(tmp_path, monkeypatch, mlflow):
    with pytest.raises(InputError, match="'tensorbord'; known: tensorboard, wandb, mlflow"):
        check_loggers(("tensorbord",))
    with pytest.raises(InputError, match="twice"):
        check_loggers(("tensorboard", "tensorboard"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs the package wandb: pip install 'qlora_jax\[wandb\]'"):
        check_loggers(("wandb",))
    (tmp_path / "loggers.json").write_text(json.dumps({"mlflow": "gone"}))
    with pytest.raises(InputError, match="MLflow has no run gone.*loggers.json to begin a new one"):
        Loggers(("mlflow",), tmp_path, PLAIN, 0, print)
    (tmp_path / "tensorboard").write_text("a file in its place")
    with pytest.raises(InputError, match="tensorboard cannot be begun: FileExistsError"):
        Loggers(("tensorboard",), tmp_path, PLAIN, 0, print)


def test_packs_have_none(tiny_config):
    tiny_config.train.loggers = ("tensorboard",)
    with pytest.raises(InputError, match="train.loggers = tensorboard is for single runs"):
        check_points(expand(tiny_config, axis("train.seed", [0, 1])).points, "cpu")
    with pytest.raises(InputError, match="train.loggers = tensorboard is for single runs"):
        PackRunner().train([tiny_config], None, print, lambda member, row: None)
