"""Tokenized data on disk: views of a memory map, found again by what it was made from, never half."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed import cache, load, tokenized
from qlora_jax.feed.batches import Batches, eval_batches
from qlora_jax.feed.cache import cached, contents, key_of
from qlora_jax.feed.split import split
from qlora_jax.feed.store import ExampleStore, digests_of, lengths_of, targets_of, write_examples


def examples(count=50):
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.integers(0, 9 if number % 7 else 2, length).astype(np.int32),
            rng.random(length) < 0.5,
            f"{'ab'[number % 2]}.json, line {number}",
        )
        for number, length in enumerate(rng.integers(1, 6, count))
    ]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(path: Path) -> dict:
    totals = write_examples(path, examples())
    return {"places": totals.places, "examples": totals.examples}


@pytest.fixture
def store(own_cache, monkeypatch) -> ExampleStore:
    monkeypatch.setattr("qlora_jax.feed.store._BATCH_TOKENS", 20)  # several record batches
    return cached("key", build).store


def test_a_store_is_its_examples(store):
    expected = examples()
    assert len(store) == len(expected) == 50
    for index in (*range(50), -1, -50):
        found = store[index]
        np.testing.assert_array_equal(found.tokens, expected[index].tokens)
        np.testing.assert_array_equal(found.loss_mask, expected[index].loss_mask)
        assert (found.tokens.dtype, found.loss_mask.dtype) == (np.int32, np.bool_)
        assert found.where == expected[index].where
    for of in (lengths_of, targets_of, digests_of):
        np.testing.assert_array_equal(of(store), of(expected))
    assert [e.where for e in store[3:9:2]] == [e.where for e in expected[3:9:2]]
    assert [e.where for e in store.take(np.array([9, 1])).take(np.array([1]))] == [expected[1].where]
    with pytest.raises(IndexError):
        store[50]


def test_examples_are_views_of_the_memory_map(store, own_cache):
    """Not a byte of theirs is copied: their addresses lie in the file's mapping, and they cannot be written to."""
    maps = Path("/proc/self/maps").read_text().splitlines()  # other tests' stores may still be mapped
    (mapping,) = [line for line in maps if f"{own_cache}/" in line and "examples.arrow" in line]
    begin, end = (int(part, 16) for part in mapping.split()[0].split("-"))
    for example in (store[0], store[49], store.take(np.array([20]))[0]):
        for array in (example.tokens, example.loss_mask):
            assert begin <= array.ctypes.data < end
            assert not array.flags.writeable and not array.flags.owndata


def test_split_and_batches_of_a_store_are_those_of_a_list(store):
    of_store, of_list = split(store, 9, 0), split(examples(), 9, 0)
    for mine, theirs in zip(of_store, of_list, strict=True):
        assert [e.where for e in mine] == [e.where for e in theirs]
    assert isinstance(of_store[0], ExampleStore)
    mine, theirs = (Batches(side[0], 4, True, 2, 0, 0) for side in (of_store, of_list))
    for step in range(12):
        assert all(np.array_equal(mine.batch(step)[name], array) for name, array in theirs.batch(step).items())
        assert mine.describe(step) == theirs.describe(step)
    for mine, theirs in zip(*(eval_batches(side[1], 4, 2, 0) for side in (of_store, of_list)), strict=True):
        np.testing.assert_array_equal(mine["tokens"], theirs["tokens"])


def test_an_entry_is_built_once(own_cache):
    assert cached("key", build).is_new
    entry = cached("key", lambda path: pytest.fail("built again"))
    assert not entry.is_new and entry.facts["examples"] == 50
    assert cached("other", build).is_new
    assert sorted(path.name for path in own_cache.iterdir()) == ["key", "key.lock", "other", "other.lock"]


@pytest.mark.parametrize("damage", ["cut off", "longer", "no entry", "entry cut off", "no examples", "zeros"])
def test_what_is_not_whole_is_built_again(own_cache, damage):
    folder = cached("key", build).folder
    file, entry = folder / "examples.arrow", folder / "entry.json"
    data = file.read_bytes()
    if damage == "cut off":
        file.write_bytes(data[:-100])
    elif damage == "longer":
        file.write_bytes(data + b"x")
    elif damage == "zeros":
        file.write_bytes(bytes(len(data)))
    elif damage == "no examples":
        file.unlink()
    else:
        entry.write_text(entry.read_text()[:9]) if damage == "entry cut off" else entry.unlink()
    again = cached("key", build)
    assert again.is_new and file.read_bytes() == data


def test_an_interrupted_build_leaves_nothing(own_cache):
    def interrupted(path):
        build(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("key", interrupted)
    assert [path.name for path in own_cache.iterdir()] == ["key.lock"]
    assert cached("key", build).is_new


KILLED = """
import os, signal
from qlora_jax.feed.cache import cached

def build(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

cached("key", build)
"""


def test_a_killed_build_is_cleared_by_the_next(own_cache):
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", KILLED], cwd=root, timeout=60)
    assert child.returncode == -signal.SIGKILL and (own_cache / "key.partial" / "examples.arrow").exists()
    assert len(cached("key", build).store) == 50
    assert sorted(path.name for path in own_cache.iterdir()) == ["key", "key.lock"]


def test_of_two_that_want_an_entry_one_builds(own_cache):
    own_cache.mkdir()
    built, found = [], []

    def count(path):
        built.append(path)
        return build(path)

    threads = [threading.Thread(target=lambda: found.append(cached("key", count))) for _ in range(2)]
    with cache._lock(own_cache / "key.lock"):
        for thread in threads:
            thread.start()
        threads[0].join(0.1)
        assert not built and all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(60)
    assert len(built) == 1 and sorted(entry.is_new for entry in found) == [False, True]


def test_a_full_disk_is_one_line(own_cache, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be kept in .*cache: No space left on device; .*QLORA_JAX_CACHE"):
        cached("key", build)
    assert [path.name for path in own_cache.iterdir()] == ["key.lock"]


def test_a_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be kept in .*file"):
        cached("key", build)


def test_the_key_is_of_everything(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("a")
    keys = [key_of(contents([("rows.jsonl", file)]), b"t", {"max_source_len": 1})]
    keys.append(key_of(contents([("other.jsonl", file)]), b"t", {"max_source_len": 1}))
    keys.append(key_of(contents([("rows.jsonl", file)]), b"u", {"max_source_len": 1}))
    keys.append(key_of(contents([("rows.jsonl", file)]), b"t", {"max_source_len": 2}))
    keys.append(key_of(contents([("rows.jsonl", file)] * 2), b"t", {"max_source_len": 1}))
    file.write_text("b")
    keys.append(key_of(contents([("rows.jsonl", file)]), b"t", {"max_source_len": 1}))
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "another")
    keys.append(key_of(contents([("rows.jsonl", file)]), b"t", {"max_source_len": 1}))
    assert len(set(keys)) == len(keys)
    assert key_of(contents([("rows.jsonl", file)]), b"t", {"max_source_len": 1}) == keys[-1]


def test_tokenizers_with_other_ids_or_templates_differ(byte_folder, tmp_path):
    import shutil

    from qlora_jax.text.tokenizer import Tokenizer

    other = shutil.copytree(byte_folder, tmp_path / "other")
    same = Tokenizer.from_folder(other).content()
    assert same == Tokenizer.from_folder(byte_folder).content()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "another"}))
    assert Tokenizer.from_folder(other).content() != same


def test_a_data_set_is_tokenized_once_for_all_that_changes_afterwards(own_cache, tmp_path, byte_tokenizer, monkeypatch):
    from configs.base import get_config

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"input": f"q{n}", "output": f"a{n}"}) + "\n" for n in range(20)))
    calls = []
    tokenize = tokenized.tokenize_examples
    monkeypatch.setattr(tokenized, "tokenize_examples", lambda *a: calls.append(len(a[0])) or tokenize(*a))

    def loaded(**changes):
        section = get_config().data
        section.update({"path": str(file), "format": "input-output", "eval_examples": 4} | changes)
        return load.load_data(section, byte_tokenizer, 4, 300)

    first = loaded()
    again = loaded(seed=1, packing=True, eval_examples=2, group_by_length=False, pad_to_multiple_of=8)
    assert calls == [20] and len(again.heldout) == 2 and again.is_packed
    assert any("kept in" in line for line in first.report)
    loaded(max_target_len=9)
    loaded(max_examples=5)
    loaded(eval_path=str(file), eval_examples=6)  # the training set is known
    assert calls == [20, 20, 5, 6]
    with open(file, "a") as more:
        more.write('{"input": "q", "output": "a"}\n')
    assert len(loaded().batches.examples) == 17 and calls[-1] == 21
    with open(file, "a") as more:
        more.write('{"input": "q"}\n')
    for _ in range(2):
        with pytest.raises(InputError, match="line 22: no field"):
            loaded()


def test_a_kept_set_is_read_as_it_was_written_or_made_again(own_cache):
    """One bit of any byte, of the examples or of what is said of them."""
    folder = cached("key", build).folder
    for name in ("examples.arrow", "entry.json"):
        file = folder / name
        content = file.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            damaged = bytearray(content)
            damaged[place] ^= 2
            file.write_bytes(damaged)
            entry = cached("key", build)
            assert [e.tokens.tolist() for e in entry.store] == [e.tokens.tolist() for e in examples()]
            assert [e.where for e in entry.store] == [e.where for e in examples()] and entry.facts["examples"] == 50
