"""Batches: every example once an epoch, a pure function of the step, padded and masked; and batches from a file."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, FileBatches, eval_batches, padded_length

PAD = 99


def examples_of(lengths):
    """Example i has the token i + 100 throughout, but for a first token of its own."""
    return [
        Example(
            np.array([1] + [100 + number] * (length - 1), np.int32),
            np.arange(length) > 0,
            f"f.json, line {number + 1}",
        )
        for number, length in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)
SETTINGS = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 9), "group_by_length": st.booleans(), "seed": st.integers(0, 3)}
)


@given(st.integers(1, 200_000), st.sampled_from([1, 7, 8, 16, 64, 100, 2048]))
def test_the_lengths_of_batches_are_few(length, multiple):
    T = padded_length(length, multiple)
    assert length <= T and T % multiple == 0
    assert padded_length(length + 1, multiple) >= T  # the longest row has the longest batch
    if length <= 1024:
        assert T - length < multiple
    else:
        assert T - length < length / 8 + multiple
        powers = [1 << n for n in range(11, 18)]
        assert all(len({padded_length(n, multiple) for n in range(p // 2 + 1, p + 1, 61)}) <= 10 for p in powers)


def test_lengths_of_batches_by_hand():
    found = [padded_length(n, 64) for n in (1, 64, 65, 1000, 1024, 1025, 1153, 2048, 2049, 4097, 8192)]
    assert found == [64, 64, 128, 1024, 1024, 1152, 1280, 2048, 2304, 4608, 8192]


def make(lengths, settings, multiple=8):
    return Batches(examples_of(lengths), pad_to_multiple_of=multiple, pad_id=PAD, **settings)


def numbers(batch):
    """Which examples a batch has."""
    return (batch["tokens"][:, 1] - 100).tolist()


@given(LENGTHS, SETTINGS, st.integers(1, 3))
def test_every_example_once_an_epoch(lengths, settings, epochs):
    batches = make(lengths, settings)
    count, size = len(lengths), settings["batch_size"]
    steps = -(-epochs * count // size)
    seen = [number for step in range(steps) for number in numbers(batches.batch(step))]
    for epoch in range(epochs):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert batches.steps_per_epoch == -(-count // size)


@given(LENGTHS, SETTINGS, st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(lengths, settings, steps):
    """In any order of asking, and in an object made anew: what resuming stands on."""
    batches = make(lengths, settings)
    in_order = {step: batches.batch(step) for step in sorted(steps)}
    for step in steps:
        for other in (make(lengths, settings).batch(step), batches.batch(step)):
            np.testing.assert_array_equal(other["tokens"], in_order[step]["tokens"])
            np.testing.assert_array_equal(other["loss_mask"], in_order[step]["loss_mask"])


@given(LENGTHS, SETTINGS, st.integers(1, 16), st.integers(0, 20))
def test_padding(lengths, settings, multiple, step):
    batches = make(lengths, settings, multiple)
    batch = batches.batch(step)
    tokens, loss_mask = batch["tokens"], batch["loss_mask"]
    longest = max(lengths[number] for number in numbers(batch))
    assert tokens.shape == loss_mask.shape == (settings["batch_size"], -(-longest // multiple) * multiple)
    assert (tokens.dtype, loss_mask.dtype) == (np.int32, np.bool_)
    assert tokens.shape[1] <= batches.max_length
    for row, number in enumerate(numbers(batch)):
        example = batches.examples[number]
        np.testing.assert_array_equal(tokens[row, : len(example)], example.tokens)
        np.testing.assert_array_equal(loss_mask[row, : len(example)], example.loss_mask)
        assert (tokens[row, len(example) :] == PAD).all() and not loss_mask[row, len(example) :].any()


@given(LENGTHS, SETTINGS)
def test_the_longest_example_comes_first_when_grouped(lengths, settings):
    batches = make(lengths, settings | {"group_by_length": True})
    if len(lengths) >= settings["batch_size"]:
        assert max(lengths[number] for number in numbers(batches.batch(0))) == max(lengths)


def test_grouping_saves_padding_and_keeps_the_order_random():
    lengths = np.random.default_rng(0).integers(2, 500, 1003).tolist()

    def padded(group_by_length):
        batches = make(lengths, {"batch_size": 16, "group_by_length": group_by_length, "seed": 0}, 1)
        return [batches.batch(step)["tokens"].shape[1] for step in range(63 * 3)]

    assert sum(padded(True)) < 0.7 * sum(padded(False))
    grouped = padded(True)[1:63]
    assert grouped != sorted(grouped) and grouped != sorted(grouped, reverse=True)


def test_grouping_holds_in_later_epochs_where_batches_reach_over_the_end():
    lengths = np.random.default_rng(0).integers(2, 500, 503).tolist()  # 503 = 31 * 16 + 7
    batches = make(lengths, {"batch_size": 16, "group_by_length": True, "seed": 0}, 1)
    spreads = []
    for step in range(32, 63):  # the batches of epoch 1 alone
        of_batch = [lengths[number] for number in numbers(batches.batch(step))]
        spreads.append(max(of_batch) - min(of_batch))
    assert max(sorted(spreads)[:-1]) < 60  # one batch may be the ragged end of the epoch


def test_epochs_and_seeds_differ():
    def order(seed, epoch):
        batches = make([2] * 50, {"batch_size": 10, "group_by_length": False, "seed": seed})
        return [n for step in range(epoch * 5, epoch * 5 + 5) for n in numbers(batches.batch(step))]

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), list(range(50))]
    assert len(set(map(tuple, orders))) == 5


def test_describe_names_the_lines():
    batches = make([2, 3, 4], {"batch_size": 3, "group_by_length": False, "seed": 0})
    lines = [str(number + 1) for number in numbers(batches.batch(0))]
    assert batches.describe(0) == f"f.json, lines {', '.join(lines)}"
    assert make([2], {"batch_size": 1, "group_by_length": True, "seed": 0}).describe(7) == "f.json, line 1"


def test_bad_sizes():
    settings = {"batch_size": 1, "group_by_length": True, "seed": 0}
    with pytest.raises(InputError, match="no examples to train on"):
        make([], settings)
    with pytest.raises(InputError, match="batch size 0"):
        make([2], settings | {"batch_size": 0})
    with pytest.raises(InputError, match="pad_to_multiple_of is 0"):
        make([2], settings, multiple=0)
    with pytest.raises(ValueError, match="step -1"):
        make([2], settings).batch(-1)


@given(LENGTHS, st.integers(1, 9))
def test_evaluation_takes_every_example_once(lengths, batch_size):
    found = list(eval_batches(examples_of(lengths), batch_size, 8, PAD))
    assert len(found) == -(-len(lengths) // batch_size)
    assert all(batch["tokens"].shape[0] == batch_size for batch in found)
    rows = [(row, mask) for batch in found for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)]
    real, filling = rows[: len(lengths)], rows[len(lengths) :]
    assert sorted(int(row[1]) - 100 for row, _ in real) == list(range(len(lengths)))
    assert all(not mask.any() and (row == PAD).all() for row, mask in filling)
    assert sum(int(mask.sum()) for _, mask in rows) == sum(length - 1 for length in lengths)
    lengths_in_order = [int(mask.sum()) for _, mask in real]
    assert lengths_in_order == sorted(lengths_in_order, reverse=True)


def test_file_batches(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    path = str(tmp_path / "b.npy")
    np.save(path, array)
    batches = FileBatches(path)
    assert (len(batches), batches.steps_per_epoch, batches.batch_size, batches.max_length) == (2, 2, 3, 4)
    assert batches.max_token_id == 23
    for step in range(4):
        batch = batches.batch(step)
        np.testing.assert_array_equal(batch["tokens"], array[step % 2])
        np.testing.assert_array_equal(batch["loss_mask"], np.array([[False, True, True, True]] * 3))
        assert type(batch["tokens"]) is np.ndarray and batch["tokens"].dtype == np.int32
    assert batches.describe(3) == f"{path}, batch 1"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3, 4), np.int64), "dtype int64, expected int32"),
        (np.zeros((2, 3), np.int32), r"shape \[2, 3\], expected \[n, B, T\]"),
        (np.zeros((0, 3, 4), np.int32), r"shape \[0, 3, 4\]"),
        (np.zeros((2, 3, 1), np.int32), "T >= 2"),
        (np.full((2, 3, 4), -100, np.int32), "batch 0 has the negative token id -100"),
        (np.array([{}]), "not a readable .npy file"),
    ],
)
def test_bad_arrays(tmp_path, array, message):
    np.save(tmp_path / "b.npy", array)
    with pytest.raises(InputError, match=message):
        FileBatches(str(tmp_path / "b.npy"))


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        FileBatches(str(tmp_path / "b.npy"))
    (tmp_path / "b.npy").write_bytes(b"text")
    with pytest.raises(InputError, match="not a readable .npy file"):
        FileBatches(str(tmp_path / "b.npy"))
    np.save(tmp_path / "b.npy", np.zeros((2, 3, 4), np.int32))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-8])
    with pytest.raises(InputError, match="not a readable .npy file"):
        FileBatches(str(tmp_path / "b.npy"))
    np.savez(tmp_path / "b.npz", np.zeros((2, 3, 4), np.int32))
    with pytest.raises(InputError, match="npz archive"):
        FileBatches(str(tmp_path / "b.npz"))
