"""Batches ahead of the steps: in order, once each, from any step on, and shared out among hosts."""

import threading
import time

import numpy as np
import pytest

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, FileBatches
from qlora_jax.feed.packing import PackedBatches
from qlora_jax.feed.pipeline import AHEAD, prefetched, step_dataset


def examples(count=37):
    lengths = np.random.default_rng(0).integers(2, 30, count)
    return [
        Example(np.full(length, number, np.int32), np.arange(length) > 0, f"f, line {number}")
        for number, length in enumerate(lengths)
    ]


@pytest.fixture(params=["shuffled", "grouped", "packed", "file"])
def batches(request, tmp_path):
    if request.param == "file":
        np.save(tmp_path / "b.npy", np.arange(5 * 6 * 4, dtype=np.int32).reshape(5, 6, 4))
        return FileBatches(str(tmp_path / "b.npy"))
    if request.param == "packed":
        return PackedBatches(examples(), 6, 32, 0, 1)
    return Batches(examples(), 6, request.param == "grouped", 8, 0, 1)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("start", [0, 1, 7, 20])
def test_from_any_step_on_it_is_the_uninterrupted_order(batches, start):
    feed = prefetched(step_dataset(batches, 20, 0, 1), start)
    found = list(feed)
    assert len(found) == 20 - start
    assert all(same(batch, batches.batch(step)) for step, batch in enumerate(found, start))


def test_its_state_is_the_number_of_the_next_step(batches):
    feed = prefetched(step_dataset(batches, 20, 0, 1), 3)
    taken = [next(feed) for _ in range(4)]
    state = feed.get_state()
    feed.close()
    assert state == {"next_index": 7} and same(taken[-1], batches.batch(6))
    again = prefetched(step_dataset(batches, 20, 0, 1), state["next_index"])
    assert same(next(again), batches.batch(7))  # what was read ahead before is neither lost nor repeated
    again.close()


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shards_of_all_hosts_are_the_batch(batches, count):
    parts = [prefetched(step_dataset(batches, 8, index, count), 0) for index in range(count)]
    for step in range(8):
        of_hosts = [next(part) for part in parts]
        for name, array in batches.batch(step).items():
            assert [part[name].shape[0] for part in of_hosts] == [6 // count] * count
            np.testing.assert_array_equal(np.concatenate([part[name] for part in of_hosts]), array)


def test_an_epoch_of_two_hosts_has_every_example_once():
    batches = Batches(examples(36), 6, True, 8, 0, 1)
    numbers = [
        number
        for index in range(2)
        for batch in prefetched(step_dataset(batches, 6, index, 2), 0)
        for number in batch["tokens"][:, 0].tolist()
    ]
    assert len(numbers) == 36 and sorted(numbers) == list(range(36))


def test_hosts_are_jax_processes_by_default(batches, monkeypatch):
    import jax

    assert same(step_dataset(batches, 3)[2], batches.batch(2))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert same(step_dataset(batches, 3)[2], step_dataset(batches, 3, 1, 3)[2])


def test_batches_that_cannot_be_divided(batches):
    with pytest.raises(InputError, match="batches of 6 sequences cannot be divided among 4 hosts"):
        step_dataset(batches, 3, 0, 4)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        step_dataset(batches, 3, 2, 2)


class Watched:
    """Counts the batches that were made; the fifth fails where `fails`."""

    batch_size = 1

    def __init__(self, fails=False):
        self.made, self.fails, self.threads = 0, fails, set()

    def batch(self, step, shard):
        self.threads.add(threading.current_thread())
        if self.fails and step == 5:
            raise InputError("the disk is gone")
        self.made += 1
        return {"tokens": np.array([step])}


def test_batches_are_made_before_they_are_asked_for():
    source = Watched()
    feed = prefetched(step_dataset(source, 100, 0, 1), 0)
    assert next(feed)["tokens"] == 0
    until = time.monotonic() + 20
    while source.made < AHEAD and time.monotonic() < until:
        time.sleep(0.001)
    assert AHEAD <= source.made <= AHEAD + 2
    assert threading.current_thread() not in source.threads
    feed.close()


def test_what_goes_wrong_in_the_thread_reaches_the_step():
    feed = prefetched(step_dataset(Watched(fails=True), 100, 0, 1), 0)
    assert [int(next(feed)["tokens"][0]) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(InputError, match="the disk is gone"):
        next(feed)
    feed.close()
