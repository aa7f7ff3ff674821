"""Packing: several examples one after the other in rows of one length, so that hardly any of a batch is padding.

Which examples share a row is decided once for a seed: the longest come first, equally long ones shuffled, and each goes
into the first row that has room for it (first-fit). An epoch is a permutation of the rows, so every epoch has the same
number of them, and the step is all the position there is. A row's examples do not see each other (Decoder's segments),
so it does not matter to them that they meet again in the next epoch. grain's own packing fills its bins as examples
come by: there the position is the state of a pipeline, and a batch cannot be made from its number.

With shares of several data sets the examples of each are packed on their own, and an epoch has rows of each set: so
many that its share of the examples is what was asked for.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_jax.data.examples import Example, Lengths
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import WHOLE, Shard, describe, round_up
from qlora_jax.feed.orders import Mixture, Orders, Shares
from qlora_jax.feed.store import lengths_of


def pack_length(data: Any, longest: int) -> int:
    """Tokens of a packed row, by the config's `data` section: pack_length; or what an example may have at most, where
    the config says it, else the `longest` of the data set; rounded up."""
    lengths = Lengths.of(data)
    return data.pack_length or round_up(lengths.room if lengths.are_given else longest, data.pad_to_multiple_of)


class Plan(NamedTuple):
    """Row r has examples[starts[r] : starts[r + 1]]: int [n] and int [rows + 1]."""

    examples: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def of_row(self, row: int) -> np.ndarray:
        """int [examples of the row]."""
        return self.examples[self.starts[row] : self.starts[row + 1]]


def first_fit(lengths: np.ndarray, order: np.ndarray, T: int) -> Plan:
    """Examples of `lengths`, int [n], none over T, taken in `order`, each into the first row of T tokens with room.

    Rows with room are found in a tree over all rows, whose nodes have the most room below them: log n for each example.
    """
    at_most = 2 * int(lengths.sum()) // T + 1  # all rows but one are more than half full
    leaves = 1
    while leaves < at_most:
        leaves *= 2
    room = array("i", [T]) * (2 * leaves)  # node i is above 2 i and 2 i + 1; leaf `leaves` + r is row r
    rows = np.empty(len(order), np.int64)
    for place, length in enumerate(lengths[order].tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        rows[place] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
    by_row = np.argsort(rows, kind="stable")
    return Plan(order[by_row], np.concatenate([[0], np.cumsum(np.bincount(rows))]))


class PackedBatches:
    """Training batches of B rows of T tokens, for ever; as Batches, with several examples in a row.

    Attributes:
      steps_per_epoch: steps until every example was seen; the last of them may reach into the next epoch.
      max_length: T. longest_example: tokens of the longest example.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        T: int,
        pad_id: int,
        seed: int,
        shares: Shares | None = None,
    ) -> None:
        """`pad_id`: any id, since padding is masked and comes last. `shares` as of Batches. Raises InputError: an
        example is longer than T."""
        if batch_size < 1:
            raise InputError(f"batch size {batch_size}, expected at least 1")
        if not examples:
            raise InputError("there are no examples to train on")
        self.examples = examples
        self.batch_size = batch_size
        self.max_length = T
        self._pad_id = pad_id
        self._seed = seed
        self._lengths = check_fits(examples, T)
        self.longest_example = int(self._lengths.max())
        order = _longest_first(self._lengths, self._permutation(len(examples), (2,)))
        if shares is None:
            self.plan = first_fit(self._lengths, order, T)
            self._orders = Orders(lambda epoch: self._permutation(self.plan.rows, (1, epoch)))
        else:
            self.plan, mixture = _mixed(self._lengths, order, T, shares, seed)
            self._orders = Orders(lambda epoch: mixture.drawn(epoch)[self._permutation(self.plan.rows, (1, epoch))])
        self.steps_per_epoch = -(-self.plan.rows // batch_size)

    def batch(self, step: int, shard: Shard = WHOLE) -> dict[str, np.ndarray]:
        """tokens int32, loss_mask bool and segments int32 [B, T] of a step, counted from 0; of a shard its rows alone.

        Segments are 1, 2, ... along a row and 0 for padding. An example's first token is no target.
        """
        rows = self._rows(step)[shard.rows(self.batch_size)]
        return pack(self.examples, self.plan, rows, len(rows), self.max_length, self._pad_id)

    def padded(self, steps: int) -> tuple[int, np.ndarray]:
        """Of the first steps: their examples' tokens, and the T of each step, int [steps]."""
        tokens = np.add.reduceat(self._lengths[self.plan.examples], self.plan.starts[:-1], dtype=np.int64)
        rows = self._orders.places(0, steps * self.batch_size, self.plan.rows)
        return int(tokens[rows].sum()), np.full(steps, self.max_length)

    def describe(self, step: int) -> str:
        """The files and lines of a step's examples."""
        return describe(self.examples[int(i)].where for row in self._rows(step) for i in self.plan.of_row(row))

    def _rows(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step {step}, expected 0 or more")
        return self._orders.places(step * self.batch_size, (step + 1) * self.batch_size, self.plan.rows)

    def _permutation(self, n: int, key: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=key)).permutation(n)


def _mixed(lengths: np.ndarray, order: np.ndarray, T: int, shares: Shares, seed: int) -> tuple[Plan, Mixture]:
    """Rows of one set each, and how they are drawn."""
    groups = shares.groups()
    plans = [first_fit(lengths, order[shares.sets[order] == number], T) for number in range(len(groups))]
    begins = np.cumsum([0, *(plan.rows for plan in plans)])
    ends = np.concatenate([np.diff(plan.starts) for plan in plans])
    plan = Plan(np.concatenate([plan.examples for plan in plans]), np.concatenate([[0], np.cumsum(ends)]))
    rows = [np.arange(first, last) for first, last in zip(begins[:-1], begins[1:], strict=True)]
    weights = [w * len(own) / len(group) for w, own, group in zip(shares.weights, rows, groups, strict=True)]
    return plan, Mixture(rows, weights, plan.rows, shares, seed, "packed rows")


def packed_eval_batches(
    examples: Sequence[Example], batch_size: int, T: int, pad_id: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, packed: tokens, loss_mask and segments as of PackedBatches.

    The last batch is filled with rows of padding that have no target.
    """
    if not examples:
        return
    lengths = check_fits(examples, T)
    plan = first_fit(lengths, _longest_first(lengths, np.arange(len(examples))), T)
    for start in range(0, plan.rows, batch_size):
        rows = np.arange(start, min(start + batch_size, plan.rows))
        yield pack(examples, plan, rows, batch_size, T, pad_id)


def pack(
    examples: Sequence[Example], plan: Plan, rows: np.ndarray, B: int, T: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Some rows of a plan: tokens int32, loss_mask bool and segments int32 [B, T], padded at the end and below."""
    tokens = np.full((B, T), pad_id, np.int32)
    loss_mask = np.zeros((B, T), np.bool_)
    segments = np.zeros((B, T), np.int32)
    for row, packed in enumerate(rows):
        at = 0
        for number, index in enumerate(plan.of_row(packed).tolist(), 1):
            example = examples[index]
            place = (row, slice(at, at + len(example)))
            tokens[place], loss_mask[place], segments[place] = example.tokens, example.loss_mask, number
            loss_mask[row, at] = False  # nothing of its own example predicts it
            at += len(example)
    return {"tokens": tokens, "loss_mask": loss_mask, "segments": segments}


def _longest_first(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`order` sorted by length, equally long ones as they stood."""
    return order[np.argsort(-lengths[order], kind="stable")]


def check_fits(examples: Sequence[Example], T: int) -> np.ndarray:
    """The lengths of the examples, int [n]. Raises InputError where one is over T tokens."""
    lengths = lengths_of(examples)
    longest = int(np.argmax(lengths))
    if lengths[longest] > T:
        raise InputError(
            f"{examples[longest].where}: {lengths[longest]} tokens do not fit into packed rows of {T}: make "
            "data.pack_length longer (0 holds the longest), or set data.max_source_len and data.max_target_len lower"
        )
    return lengths
