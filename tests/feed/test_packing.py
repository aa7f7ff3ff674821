"""Packed rows: first-fit, every example once an epoch, segments and masks, one shape, a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, Shard
from qlora_jax.feed.packing import PackedBatches, first_fit, packed_eval_batches
from qlora_jax.feed.padding import padding

PAD, T = 99, 40


def examples_of(lengths):
    """Example i is i + 100 throughout; every token is learned, also the first, which a packed row must not learn."""
    return [
        Example(np.full(length, 100 + number, np.int32), np.ones(length, np.bool_), f"f, line {number + 1}")
        for number, length in enumerate(lengths)
    ]


LENGTHS = st.lists(st.integers(1, T), min_size=1, max_size=60)


def make(lengths, batch_size=3, seed=0):
    return PackedBatches(examples_of(lengths), batch_size, T, PAD, seed)


def examples_in(batch):
    """Numbers of the examples of a batch, row by row, each once."""
    return [
        int(tokens[segments == segment][0]) - 100
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
        for segment in range(1, segments.max() + 1)
    ]


@given(LENGTHS)
def test_first_fit_is_what_looking_at_every_row_gives(lengths):
    order = np.random.default_rng(0).permutation(len(lengths))
    rows: list[list[int]] = []
    for index in order.tolist():
        fitting = [row for row in rows if sum(lengths[i] for i in row) + lengths[index] <= T]
        if fitting:
            fitting[0].append(index)
        else:
            rows.append([index])
    plan = first_fit(np.array(lengths), order, T)
    assert [plan.of_row(row).tolist() for row in range(plan.rows)] == rows


@given(LENGTHS, st.integers(1, 5), st.integers(0, 2), st.integers(1, 3))
def test_every_example_once_an_epoch(lengths, batch_size, seed, epochs):
    batches = make(lengths, batch_size, seed)
    rows = batches.plan.rows
    steps = -(-epochs * rows // batch_size)
    seen = [batches.batch(step) for step in range(steps)]
    by_row = [
        examples_in({name: array[row : row + 1] for name, array in batch.items()})
        for batch in seen
        for row in range(batch_size)
    ]
    for epoch in range(epochs):
        of_epoch = by_row[epoch * rows : (epoch + 1) * rows]
        assert sorted(number for row in of_epoch for number in row) == list(range(len(lengths)))
    assert batches.steps_per_epoch == -(-rows // batch_size)


@given(LENGTHS, st.integers(0, 9))
def test_a_row(lengths, step):
    batches = make(lengths)
    batch = batches.batch(step)
    assert {(array.shape, array.dtype.name) for array in batch.values()} == {
        ((3, T), "int32"), ((3, T), "bool"),
    }  # fmt: skip
    for tokens, mask, segments in zip(*batch.values(), strict=True):
        filled = int((segments > 0).sum())
        assert (segments[:filled] > 0).all() and (tokens[filled:] == PAD).all() and not mask[filled:].any()
        assert (np.diff(segments[:filled]) >= 0).all() and segments[0] == 1
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            number = int(tokens[at[0]]) - 100
            assert (tokens[at] == number + 100).all() and len(at) == lengths[number]
            assert not mask[at[0]] and mask[at[1:]].all()
    other = make(lengths).batch(step)
    assert all(np.array_equal(batch[name], other[name]) for name in batch)


def test_seeds_and_epochs_differ():
    lengths = [10] * 60
    orders = [
        tuple(n for step in range(5 * epoch, 5 * epoch + 5) for n in examples_in(make(lengths, 3, seed).batch(step)))
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_packing_wastes_less_than_grouping():
    lengths = np.random.default_rng(0).integers(2, T // 2, 500).tolist()
    packed, grouped = padding(make(lengths, 8)), padding(Batches(examples_of(lengths), 8, True, 8, PAD, 0))
    assert packed.waste < 0.02 < grouped.waste < 0.5
    assert list(packed.steps_by_length) == [T] and packed.rows == make(lengths, 8).plan.rows
    batches = [make(lengths, 8).batch(step) for step in range(packed.steps)]
    assert packed.tokens == sum(int((batch["segments"] > 0).sum()) for batch in batches)
    assert packed.padded == sum(batch["tokens"].size for batch in batches)


def test_shards_are_rows_of_the_batch():
    batches = make([10] * 23, 4)
    for step in range(3):
        whole = batches.batch(step)
        parts = [batches.batch(step, Shard(index, 2)) for index in range(2)]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@given(LENGTHS, st.integers(1, 4))
def test_evaluation_takes_every_example_once(lengths, batch_size):
    found = list(packed_eval_batches(examples_of(lengths), batch_size, T, PAD))
    assert {batch["tokens"].shape for batch in found} == {(batch_size, T)}
    assert sorted(number for batch in found for number in examples_in(batch)) == list(range(len(lengths)))
    assert sum(int(batch["loss_mask"].sum()) for batch in found) == sum(lengths) - len(lengths)


def test_mistakes():
    with pytest.raises(InputError, match=r"f, line 2: 41 tokens do not fit into packed rows of 40: .*pack_length"):
        make([3, T + 1])
    with pytest.raises(InputError, match="no examples"):
        make([])
    with pytest.raises(InputError, match="batch size 0"):
        make([3], 0)
    with pytest.raises(ValueError, match="step -1"):
        make([3]).batch(-1)


def test_describe_names_all_lines_of_a_batch():
    batches = make([10] * 4, 1)
    assert sorted(batches.describe(0).removeprefix("f, lines ").split(", ")) == ["1", "2", "3", "4"]
