"""Each member of a pack ends as if it had been trained alone, whatever the others do."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import base
from qlora_jax.errors import InputError
from qlora_jax.packs.pack import PackRunner, export_member, pack_key, train_pack
from qlora_jax.packs.run import PackRun
from qlora_jax.settings import config_hash, resolved
from qlora_jax.train.checkpoints import Checkpoints
from qlora_jax.train.loop import finetune
from qlora_jax.train.workdir import Workdir

STEPS = 4
# float32 rounding: of losses, and of parameters, which Adam moves by up to learning_rate a step however small the
# gradient. Found: 1e-6 and 9e-5
LOSS_ROUNDING, ADAPTER_ROUNDING = 5e-6, 3e-4


def quiet(line: str) -> None:
    pass


def varied(config, **changes):
    """A copy with keys such as lora__rank changed."""
    copied = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, name = key.split("__")
        copied[section][name] = value
    return copied


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    """A run of 4 steps of 4 sequences of 12 tokens in float32."""
    path = tmp_path_factory.mktemp("data") / "batches.npy"
    np.save(path, np.random.default_rng(0).integers(3, 96, (STEPS, 4, 12)).astype(np.int32))
    c = base.get_config()
    c.model.path = str(golden / "llama" / "llama1")
    c.model.update(compute_dtype="float32", remat="none")
    c.lora.update(rank=4, alpha=16.0, dropout=0.1, targets=("q_proj", "down_proj"))
    c.data.batches = str(path)
    c.optimizer.learning_rate = 1e-2
    c.train.update(steps=STEPS, batch_size=4, grad_accum=2, checkpoint_every=2)
    return c


@pytest.fixture(scope="module")
def runners():
    """Compiled once for all tests of this file."""
    return {over: PackRunner(over) for over in ("map", "vmap")}


@pytest.fixture(scope="module")
def members(config):
    """Members that differ in all that a pack allows; the last has less than the pack's rank and layers.

    What is a constant of a run's gradient - scale, dropout, clipping - is the same in two of them, whose runs share a
    program then.
    """
    other = Path(config.data.batches).with_name("other.npy")
    np.save(other, np.random.default_rng(5).integers(3, 96, (STEPS, 4, 12)).astype(np.int32))
    alike = varied(config, lora__use_rslora=True, optimizer__max_grad_norm=0.0)
    return [
        varied(config, lora__alpha=12.0, lora__dropout=0.3, train__seed=7, optimizer__learning_rate=3e-3),
        varied(alike, optimizer__weight_decay=0.1, data__batches=str(other)),
        varied(alike, train__steps=3, optimizer__schedule="cosine", optimizer__warmup_steps=1),
        varied(config, lora__rank=3, lora__alpha=5.0, lora__targets=("mlp.down_proj",)),
    ]


@pytest.fixture(scope="module")
def alone(members, tmp_path_factory):
    """(summary, rows, adapter) of each member's own run."""
    folder = tmp_path_factory.mktemp("alone")
    found = []
    for number, config in enumerate(members):
        path = folder / str(number)
        summary = finetune(config, resolved(config), path, say=quiet)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found.append((summary, rows, load_file(path / "adapter" / "adapter_model.safetensors")))
    return found


def exported(result, folder: Path) -> dict[str, np.ndarray]:
    export_member(result, folder)
    return load_file(folder / "adapter_model.safetensors")


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def assert_same_adapter(a, b, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], err_msg=key, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("over", ["map", "vmap"])
def test_each_member_equals_its_own_run(runners, members, alone, tmp_path, over):
    """Bit for bit one after the other, where rank and layers are the pack's; elsewhere sums may round otherwise."""
    rows = [[] for _ in members]
    results = train_pack(members, say=quiet, on_row=lambda i, row: rows[i].append(row), runner=runners[over])
    for number, (result, (summary, its_rows, adapter)) in enumerate(zip(results, alone, strict=True)):
        assert result.status == "done" and result.config_hash == summary["config_hash"]
        assert result.rows == rows[number] and len(rows[number]) == summary["steps"]
        for key in (
            "steps",
            "base_bytes",
            "base_bits_per_param",
            "trainable_params",
            "total_params",
            "final_eval_loss",
        ):
            assert result.summary[key] == summary[key], key
        assert summary.keys() <= result.summary.keys()
        mine = exported(result, tmp_path / "adapter")
        if over == "map" and number < 3:
            assert list(map(untimed, result.rows)) == list(map(untimed, its_rows))
            assert result.summary["final_train_loss"] == summary["final_train_loss"]
            assert_same_adapter(mine, adapter)
        else:
            found, expected = ([row["loss"] for row in some] for some in (result.rows, its_rows))
            np.testing.assert_allclose(found, expected, rtol=LOSS_ROUNDING)
            assert_same_adapter(mine, adapter, rtol=0, atol=ADAPTER_ROUNDING)


def test_a_member_that_is_spoiled_stops_and_the_others_go_on(runners, members, tmp_path):
    """Its learning rate sends activations to infinity; its adapter stays as before the update that it did not take."""
    wild = varied(members[1], optimizer__learning_rate=1e30, train__seed=3)
    good = train_pack(members, say=quiet, runner=runners["map"])
    said = []
    results = train_pack([members[0], wild, *members[2:]], say=said.append, runner=runners["map"])
    stopped = results[1]
    assert stopped.status == stopped.summary["status"] == "not_finite"
    at = stopped.rows[-1]["step"]
    assert 1 < at <= STEPS and stopped.summary["steps"] == at - 1 == len(stopped.rows) - 1
    assert stopped.reason.startswith(f"step {at}: loss ") and "other.npy, batch" in stopped.reason
    assert any("member 1" in line and "the others go on" in line for line in said)
    assert all(np.isfinite(x).all() for pair in stopped.adapter.values() for x in pair)
    ended = varied(wild, train__steps=at - 1)
    before = train_pack([members[0], ended, *members[2:]], say=quiet, runner=runners["map"])[1]
    assert_same_adapter(exported(stopped, tmp_path / "a"), exported(before, tmp_path / "b"))
    for number in (0, 2, 3):
        assert_same_adapter(exported(results[number], tmp_path / "a"), exported(good[number], tmp_path / "b"))


def test_a_member_that_its_last_update_spoils_is_not_done(runners, members, alone, tmp_path):
    """No loss after it would show it. It gets no adapter, and the others what they get alone."""
    wild = varied(members[0], optimizer__learning_rate=3e38, optimizer__weight_decay=1e3, train__steps=1)
    configs = [wild, *members[1:]]
    results = train_pack(configs, tmp_path / "pack", quiet, runner=runners["map"], write_members=True)
    assert [result.status for result in results] == ["not_finite", "done", "done", "done"]
    assert results[0].reason == "step 1: the adapter holds NaN or inf after the update"
    folders = [tmp_path / "pack" / "members" / result.config_hash for result in results]
    assert [(folder / "adapter").exists() for folder in folders] == [False, True, True, True]
    with pytest.raises(InputError, match="holds (NaN|inf)"):
        export_member(results[0], tmp_path / "out")
    assert_same_adapter(exported(results[1], tmp_path / "out"), alone[1][2])


def test_a_held_out_loss_that_is_not_finite_is_not_done(runners, members, monkeypatch):
    bad = (float("nan"), 0.5)
    monkeypatch.setattr(PackRun, "_evaluate", lambda self, members: {n: bad if n == 1 else (2.0, 0.5) for n in members})
    said, configs = [], [varied(config, eval__every=2) for config in members]
    results = train_pack(configs, say=said.append, runner=runners["map"])
    assert [result.status for result in results] == ["done", "not_finite", "done", "done"]
    assert [result.summary["final_eval_loss"] for result in results] == [2.0, None, 2.0, 2.0]
    assert results[1].reason == f"step {STEPS}: held-out loss nan after the update"
    assert not any("eval_loss" in row for row in results[1].rows)
    assert sum("member 1" in line and "held-out loss nan" in line for line in said) == 3  # at steps 0, 2 and the end


def test_a_pack_goes_on_where_it_was_killed(runners, members, tmp_path, monkeypatch):
    """Bit for bit, with the rows and the reasons of what came before, and its members as folders of runs."""
    wild = varied(members[1], optimizer__learning_rate=1e30)
    configs = [members[0], wild, *members[2:]]
    train = lambda name: train_pack(  # noqa: E731
        configs, tmp_path / name, quiet, runner=runners["map"], write_members=True
    )
    whole = train("whole")
    with monkeypatch.context() as patch:
        original = Checkpoints.save

        def crash_later(self, step, *rest):
            if step == STEPS:
                raise RuntimeError("power cut")
            original(self, step, *rest)

        patch.setattr(Checkpoints, "save", crash_later)
        with pytest.raises(RuntimeError, match="power cut"):
            train("cut")
    again = train("cut")
    for a, b in zip(whole, again, strict=True):
        assert list(map(untimed, a.rows)) == list(map(untimed, b.rows)) and a.status == b.status
        assert_same_adapter(exported(a, tmp_path / "a"), exported(b, tmp_path / "b"))
    for config, result in zip(configs, again, strict=True):
        folder = tmp_path / "cut" / "members" / config_hash(resolved(config))
        assert json.loads((folder / "config.json").read_text()) == resolved(config)
        assert json.loads((folder / "summary.json").read_text()) == result.summary
        assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == result.rows
        assert_same_adapter(
            load_file(folder / "adapter" / "adapter_model.safetensors"), exported(result, tmp_path / "a")
        )
    assert json.loads((tmp_path / "cut" / "members.json").read_text()) == list(map(resolved, configs))
    with pytest.raises(InputError, match="run of another config .members: 4 there, 2 here"):
        train_pack(configs[:2], tmp_path / "cut", quiet, runner=runners["map"])
    with pytest.raises(InputError, match="members 0 and 2 of the pack are one config"):
        train_pack([*configs[:2], configs[0]], tmp_path / "twice", quiet, runner=runners["map"])


def test_a_pack_goes_on_from_whole_checkpoints_and_unchanged_data_alone(runners, members, tmp_path, monkeypatch):
    """A damaged newest one is set aside; another content of a member's data is refused, and so is a folder in use."""
    train = lambda: train_pack(members, tmp_path / "pack", said.append, runner=runners["map"])  # noqa: E731
    said: list[str] = []
    whole = train()
    newest = tmp_path / "pack" / "checkpoints" / str(STEPS)
    largest = max(newest.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said.clear()
    again = train()
    assert f"{newest} cannot be used" in said[0] and said[-1] == "pack: resumed, 2 steps done"
    assert {path.name for path in newest.parent.iterdir()} == {"2", "4", "4.set_aside"}
    for a, b in zip(whole, again, strict=True):
        assert list(map(untimed, a.rows)) == list(map(untimed, b.rows))
        assert_same_adapter(exported(a, tmp_path / "a"), exported(b, tmp_path / "b"))
    batches = np.load(members[1].data.batches)
    batches[-1, -1, -1] += 1
    np.save(members[1].data.batches, batches)
    runners["map"].warm._data._values.clear()  # as in another process
    try:
        with pytest.raises(InputError, match=r"pack cannot go on: .*other.npy changed.* what data.batches stands for"):
            train()
    finally:
        batches[-1, -1, -1] -= 1
        np.save(members[1].data.batches, batches)
        runners["map"].warm._data._values.clear()
    holder = Workdir(tmp_path / "pack", json.loads((tmp_path / "pack" / "config.json").read_text()))
    monkeypatch.setattr(type(runners["map"].warm), "base", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(InputError, match="in use by another process"):
        train()
    holder.close()


def test_the_base_keeps_its_bits_and_is_loaded_once(runners, members):
    said = []
    base = runners["map"].warm.base(members[0], said.append)
    before = jax.tree.map(np.array, jax.tree.leaves(base.state))
    train_pack(members, say=said.append, runner=runners["map"])
    assert runners["map"].warm.base(members[1], said.append) is base and not any(x.startswith("model:") for x in said)
    for a, b in zip(before, jax.tree.leaves(base.state), strict=True):
        assert a.tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"quant__format": "fp4"}, 'quant.format: "nf4" there, "fp4" here'),
        ({"optimizer__name": "lion"}, "optimizer.name"),
        ({"optimizer__beta2": 0.99}, "optimizer.beta2"),
        ({"train__grad_accum": 4}, "train.grad_accum: 2 there, 4 here"),
    ],
)
def test_what_members_must_share_is_named(config, changes, differing):
    other = varied(config, **changes)
    assert pack_key(resolved(config)) != pack_key(resolved(other))
    with pytest.raises(InputError, match=f"members 0 and 1 of a pack differ.*{differing}"):
        train_pack([config, other], say=quiet)


def test_keys_of_packs(config, members):
    """Equal for what may differ; apart for what would waste work; ranks of 8-bit state are shared."""
    key = lambda config: pack_key(resolved(config))  # noqa: E731
    assert key(config) == key(members[0]) == key(members[3])
    assert key(config) == key(members[2]) != key(varied(members[2], lora__dropout=0.0))
    short, long = (
        varied(config, data__batches="", data__max_source_len=n, data__max_target_len=128) for n in (20, 384)
    )
    assert key(short) == key(varied(short, data__path="somewhere", data__seed=3, data__max_source_len=60))
    assert key(short) != key(long)
    # where the data set says how long rows are, members have one set
    whole = varied(config, data__batches="", data__path="a.json")
    assert key(whole) == key(varied(whole, data__seed=3, data__max_examples=9, data__train_on_source=True))
    others = {"path": "b.json", "format": "dolly", "template": "chat", "max_target_len": 9}
    assert all(key(whole) != key(varied(whole, **{f"data__{name}": value})) for name, value in others.items())
    packed = varied(whole, data__packing=True, data__pack_length=100)
    assert key(packed) == key(varied(packed, data__path="b.json", data__pack_length=128)) != key(whole)
    eight, other = (varied(config, optimizer__name="adamw8bit", lora__rank=r) for r in (4, 2))
    assert key(eight) != key(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__paging": "always"}, "a pack's state stays on the device: set optimizer.paging=auto"),
        ({"lora__rank": 0}, "lora.rank is 0"),
        ({"train__steps": 0}, "train.steps is 0"),
        ({"lora__targets": ("q_porj",)}, "matches no linear layer"),
    ],
)
def test_bad_values_say_what_is_expected(config, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_pack([varied(config, **changes)], tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_no_members():
    with pytest.raises(InputError, match="at least one config"):
        train_pack([])
