"""A ledger holds points of one content: what changed since some are done is refused, and named."""

import json
from pathlib import Path

import pytest

from configs import quickstart
from qlora_jax.errors import InputError
from qlora_jax.sweep.check import check_points
from qlora_jax.sweep.grid import axis, expand
from qlora_jax.sweep.inputs import check_inputs, contents
from qlora_jax.sweep.ledger import Ledger, Outcome
from qlora_jax.sweep.search import Search, choice, configs_of, uniform
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture
def config(tmp_path):
    c = quickstart.get_config()
    c.model.path = str(write_tiny_checkpoint(tmp_path / "model"))
    for name in ("a.json", "b.json", "held.json"):
        (tmp_path / name).write_text(json.dumps([{"instruction": name, "output": "x"}]))
    c.data.path, c.data.eval_path = str(tmp_path / "a.json"), str(tmp_path / "held.json")
    return c


@pytest.fixture
def points(config, tmp_path):
    return expand(config, axis("data.path", [str(tmp_path / "a.json"), str(tmp_path / "b.json")])).points


@pytest.fixture
def ledger(points, tmp_path):
    """Its first point is done, and it noted what its configs stand for."""
    ledger = Ledger(tmp_path / "sweep")
    ledger.add(points)
    check_inputs(ledger, [point.config for point in points])
    ledger.start("pack", [points[0].hash], "here")
    ledger.finish([Outcome(points[0].hash, {"final_eval_loss": 1.0})])
    yield ledger
    ledger.close()


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-6] ^= 1
    file.write_bytes(content)


def test_each_of_several_data_sets_is_noted(config, tmp_path):
    both = f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}"
    points = expand(config, axis("data.path", [both, str(tmp_path / "b.json")])).points
    names = contents([point.config for point in points])
    assert {f"data.path={tmp_path / name}" for name in ("a.json", "b.json")} <= names.keys()
    config.data.path = both
    weighted = expand(config, axis("data.weights", [(0.7, 0.3), (1, 1)]))
    check_points(weighted.points, "cpu")
    assert [point.config["data"]["weights"] for point in weighted.points] == [[0.7, 0.3], [1, 1]]
    config.data.weights = (1.0, 2.0)
    with pytest.raises(InputError, match="data.weights has 2 weights and data.path 1 data sets"):
        check_points(expand(config, axis("data.path", [both, str(tmp_path / "b.json")])).points, "cpu")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.json", "data.path"),
        ("held.json", "data.eval_path"),
        ("model/model.safetensors", "model.path"),
        ("model/config.json", "model.path"),
        ("model/tokenizer.json", "model.path"),
    ],
)
def test_a_change_of_what_points_were_trained_with_is_refused(ledger, points, tmp_path, name, key):
    configs = [point.config for point in points]
    check_inputs(ledger, configs)
    change(tmp_path / name)
    for _ in range(2):  # a refusal changes nothing
        with pytest.raises(InputError, match=rf"{key}=.*: it changed since .*points done: 1.*another --workdir"):
            check_inputs(ledger, configs)
    change(tmp_path / name)
    check_inputs(ledger, configs)


def test_what_no_point_was_trained_with_may_change_and_a_grid_may_grow(ledger, points, config, tmp_path):
    change(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[]")
    grown = expand(config, axis("data.path", [str(tmp_path / f"{name}.json") for name in "abc"])).points
    check_inputs(ledger, [point.config for point in grown])
    ledger.add(grown)
    ledger.start("pack", [points[1].hash], "here")
    ledger.finish([Outcome(points[1].hash, {})])
    change(tmp_path / "b.json")
    with pytest.raises(InputError, match=r"data.path=.*b.json: it changed since"):
        check_inputs(ledger, [point.config for point in grown])


def test_a_sweep_of_an_older_version_goes_on_with_a_word(ledger, points, tmp_path):
    ledger.set_meta({"inputs": "{}"})
    ledger._db.execute("DELETE FROM meta WHERE key = 'inputs'")
    said: list[str] = []
    for _ in range(2):
        check_inputs(ledger, [point.config for point in points], said.append)
    assert len(said) == 1 and "cannot be checked" in said[0]
    change(tmp_path / "a.json")
    with pytest.raises(InputError, match="a.json: it changed"):
        check_inputs(ledger, [point.config for point in points], said.append)


def test_what_is_not_on_this_machine_is_taken_at_its_word(config, tmp_path):
    config.model.path, config.data.path = "owner/model", "owner/data"
    config.data.eval_path, config.eval.mmlu_data = "", str(tmp_path / "mmlu")
    (tmp_path / "mmlu" / "dev").mkdir(parents=True)
    (tmp_path / "mmlu" / "dev" / "a_dev.csv").write_text("q,1,2,3,4,A")
    (point,) = expand(config, axis("train.seed", [0])).points
    before = contents([point.config])
    assert list(before) == [f"eval.mmlu_data={tmp_path / 'mmlu'}"]
    (tmp_path / "mmlu" / "dev" / "a_dev.csv").write_text("q,1,2,3,4,B")
    assert contents([point.config]) != before


def test_a_search_names_the_files_among_its_options(config, tmp_path):
    space = {"data.path": choice([str(tmp_path / "b.json")]), "optimizer.learning_rate": uniform(1e-5, 1e-3)}
    names = contents(configs_of(config, Search(space, "loss", 2, 1)))
    assert {f"data.path={tmp_path / name}" for name in ("a.json", "b.json")} <= names.keys()
