"""Resolved configs, their hashes and their differences."""

import hashlib
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.api.names import set_keys
from qlora_jax.base import get_config
from qlora_jax.config_file import load_config, override
from qlora_jax.errors import InputError
from qlora_jax.settings import CAME, GONE, config_hash, differing_keys, resolved

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
sections = st.dictionaries(st.sampled_from("abc"), leaves | st.lists(leaves, max_size=2), max_size=3)
configs = st.dictionaries(st.sampled_from(["train", "model", "x"]), sections, max_size=3)


@pytest.fixture
def config(tmp_path):
    text = (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'train': {'steps': 10, 'x': 1.0}, 'lora': {'targets': ('a', 'b')}, 'note': None})\n"
    )
    (tmp_path / "c.py").write_text(text)
    return load_config(str(tmp_path / "c.py"))


def test_config_is_locked(config) -> None:
    with pytest.raises(AttributeError):
        config.train.stepz = 3


def test_override_keeps_the_lock_and_the_types(config) -> None:
    override(config, [("train.steps", "12"), ("train.x", "2"), ("lora.targets", "c")])
    assert config.is_locked and config.train.is_locked
    assert config.lora.targets == ("c",)
    assert (type(config.train.steps), type(config.train.x)) == (int, float)
    with pytest.raises(InputError, match="only be set in the config file"):
        override(config, [("note", "x")])
    with pytest.raises(InputError, match=r"--config.model.fuse_lora: this key is gone, and every run is as with False"):
        override(config, [("model.fuse_lora", "true")])


def test_a_number_may_be_left_open() -> None:
    """Also in a copy, where a key has the type of its value."""
    for config in (get_config(), get_config().copy_and_resolve_references()):
        for text, value in (("auto", "auto"), ("4", 4)):
            override(config, [("train.grad_accum", text)])
            assert config.train.grad_accum == value
        set_keys(config, {"grad_accum": "auto"})
        assert resolved(config)["train"]["grad_accum"] == "auto"
        with pytest.raises(InputError, match=r"train.grad_accum=some: expected an int \(a whole number\), or auto"):
            override(config, [("train.grad_accum", "some")])
        with pytest.raises(InputError, match="train.grad_accum is 1.5; expected a whole number, or auto"):
            set_keys(config, {"grad_accum": 1.5})


def test_resolved_is_json(config) -> None:
    plain = resolved(config)
    assert list(plain) == ["lora", "train", "note"]
    assert json.loads(json.dumps(plain)) == plain
    assert plain["lora"]["targets"] == ["a", "b"]


def test_resolved_names_what_json_cannot_hold(config) -> None:
    with config.unlocked():
        config.train.function = sys.exit
    with pytest.raises(InputError, match=r"train\.function"):
        resolved(config)


@given(configs, configs)
def test_configs_differ_exactly_if_their_hashes_do(a: dict, b: dict) -> None:
    a = {name: section for name, section in a.items() if section}
    b = {name: section for name, section in b.items() if section}
    assert bool(differing_keys(a, b)) == (config_hash(a) != config_hash(b))


@given(configs)
def test_hash_survives_json_and_order(config: dict) -> None:
    backwards = {name: dict(reversed(section.items())) for name, section in reversed(config.items())}
    assert config_hash(json.loads(json.dumps(backwards))) == config_hash(config)


def test_hash_is_of_canonical_json() -> None:
    # sha256sum of the 32 bytes {"a":{"b":[1,2.0]},"c":"\u00e9"}
    expected = "7a1f7db05849e8cc4781813f5718bc763a64ee20a994bb33d0903cf5e4a3139c"
    assert config_hash({"c": "é", "a": {"b": [1, 2.0]}}) == expected


def test_keys_that_came_do_not_count_where_they_change_nothing() -> None:
    """Folders and ledgers from before a key go on; another value of it is another run."""
    before = {"model": {"path": "a"}, "data": {"path": "b"}}
    now = {name: dict(section) for name, section in before.items()}
    for key, value in CAME.items():
        section, _, name = key.partition(".")
        now[section][name] = value
    assert config_hash(before) == config_hash(now)
    assert not differing_keys(before, now) and not differing_keys(now, before)
    now["model"]["router_aux_loss_coef"] = 0.001
    assert config_hash(before) != config_hash(now)
    assert differing_keys(before, now) == ["model.router_aux_loss_coef: missing there, 0.001 here"]


def test_keys_that_are_gone_count_with_the_value_that_changes_nothing() -> None:
    """Folders from before name them: what was left at that value goes on under the same hash, what was not is named."""
    now = {"model": {"path": "a"}, "train": {"steps": 1}}
    before = {
        "model": {"path": "a", **{key.partition(".")[2]: value for key, value in GONE.items()}},
        "train": now["train"],
    }
    assert all(key.startswith("model.") for key in GONE) and config_hash(before) == config_hash(now)
    assert (
        config_hash(before)
        == hashlib.sha256(json.dumps(before, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    )
    assert not differing_keys(before, now) and not differing_keys(now, before)
    before["model"]["compute"] = "fp8"
    assert differing_keys(before, now) == ['model.compute: "fp8" there, "full" here']
    assert config_hash(before) != config_hash(now)


def test_differences_are_named() -> None:
    there = {"train": {"steps": 10, "old": 1}, "lora": {"targets": ["a"]}}
    here = {"lora": {"targets": ["a", "b"]}, "train": {"steps": 20, "new": True}}
    assert differing_keys(there, here) == [
        'lora.targets: ["a"] there, ["a","b"] here',
        "train.steps: 10 there, 20 here",
        "train.old: 1 there, missing here",
        "train.new: missing there, true here",
    ]
