"""The held-out split: complete, disjoint, seeded, and no copy of a held-out example left in training."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.split import split
from qlora_jax.feed.store import ExampleStore, rows_of, write_examples


def examples_of(values):
    return [
        Example(np.array([1, value], np.int32), np.array([False, True]), f"f, line {number}")
        for number, value in enumerate(values)
    ]


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_sides_share_nothing_and_lose_nothing(values, eval_examples, seed):
    examples = examples_of(values)
    try:
        train, heldout = split(examples, eval_examples, seed)
    except InputError:
        assume(False)
    assert sorted(map(id, train + heldout)) == sorted(map(id, examples))
    assert not {e.tokens.tobytes() for e in train} & {e.tokens.tobytes() for e in heldout}
    assert train and 0 < len(heldout) <= eval_examples
    for side in (train, heldout):
        assert [e.where for e in side] == [e.where for e in examples if e in side]
    again = split(examples, eval_examples, seed)
    assert [e.where for e in again[1]] == [e.where for e in heldout]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40), st.integers(1, 20))
def test_examples_of_a_row_stay_together(values, eval_examples):
    """So do the rows that share an example, and what those share."""
    examples = [
        dataclasses.replace(example, where=f"f, line {row}")
        for example, (_, row) in zip(examples_of([value for value, _ in values]), values, strict=True)
    ]
    try:
        train, heldout = split(examples, eval_examples, 0, whole_rows=True)
    except InputError:
        assume(False)
    assert len(train) + len(heldout) == len(examples) and 0 < len(heldout) <= eval_examples
    for part in (lambda e: e.where, lambda e: e.tokens.tobytes()):
        assert not set(map(part, train)) & set(map(part, heldout))


def test_rows_of_a_store(tmp_path):
    examples = [
        dataclasses.replace(e, where=w)
        for e, w in zip(examples_of(range(5)), ["f, line 1", "g, line 1", "f, line 1", "", ""], strict=True)
    ]
    totals = write_examples(tmp_path / "examples.arrow", examples)
    store = ExampleStore.open(tmp_path / "examples.arrow", totals.places)
    for rows in (rows_of(examples), rows_of(store), rows_of(store.take(np.arange(5)))):
        assert [int(np.flatnonzero(rows == row)[0]) for row in rows] == [0, 1, 0, 3, 4]


def test_exact_number_and_seed():
    examples = examples_of(range(100))
    picks = [{e.where for e in split(examples, 10, seed)[1]} for seed in range(3)]
    assert all(len(pick) == 10 for pick in picks)
    assert picks[0] != picks[1] != picks[2]


def test_nothing_held_out():
    examples = examples_of(range(3))
    assert split(examples, 0, 0) == (examples, [])


def test_errors():
    with pytest.raises(InputError, match="nothing is left to train"):
        split(examples_of(range(5)), 5, 0)
    with pytest.raises(InputError, match="nothing is left to train"):
        split(examples_of([]), 1, 0)
    with pytest.raises(InputError, match="no example can be held out"):
        split(examples_of([1] * 10 + [2] * 10), 5, 0)
    with pytest.raises(InputError, match="expected 0 or more"):
        split(examples_of([1]), -1, 0)
