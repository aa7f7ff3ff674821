"""Batches as a pure function of the step: the position in the data is the step number, and resuming needs no more.

The examples form one endless line, epoch after epoch; every epoch is a full permutation of its own, and step s takes
places s * B to s * B + B - 1. So no example is dropped or repeated within an epoch, and the batch across the end of
an epoch has examples of both.

Grouped by length, an epoch's order is made as the field does it: shuffled, sorted by length within stretches of 50
batches, and the resulting batches shuffled. The places that belong to batches shared with the neighbouring epochs are
left as shuffled. The first batch of all holds the longest example: what does not fit fails at once.

With shares of several data sets an epoch is as long as without, and has of each set its share (feed/orders.Mixture).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qlora_jax import checksums
from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.orders import Mixture, Orders, Shares
from qlora_jax.feed.store import lengths_of

_STRETCH = 50  # batches sorted together
_FINE = 1024  # tokens: up to here every multiple of pad_to_multiple_of is a length of batches


@dataclasses.dataclass(frozen=True)
class Shard:
    """A host's part of every batch: the shards of all hosts together are the batch."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """Its rows of a batch. Raises InputError where they cannot be equally many for all."""
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count}")
        if batch_size % self.count:
            raise InputError(
                f"batches of {batch_size} sequences cannot be divided among {self.count} hosts: make "
                "train.batch_size a multiple"
            )
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Shard()


class Batches:
    """Training batches of a fixed size B, drawn from `examples` for ever."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        group_by_length: bool,
        pad_to_multiple_of: int,
        pad_id: int,
        seed: int,
        shares: Shares | None = None,
    ) -> None:
        """`pad_to_multiple_of`: of `padded_length`; `pad_id`: any id, since padding is masked and comes last. `shares`
        of the examples' sets; without them every example comes once an epoch."""
        _check_sizes(batch_size, pad_to_multiple_of)
        if not examples:
            raise InputError("there are no examples to train on")
        self.examples = examples
        self.batch_size = batch_size
        self._group_by_length = group_by_length
        self._multiple = pad_to_multiple_of
        self._pad_id = pad_id
        self._seed = seed
        self._lengths = lengths_of(examples)
        self._mixture: Mixture | None = None
        if shares is not None:
            groups = [_longest_first(group, self._lengths) for group in shares.groups()]
            self._mixture = Mixture(groups, shares.weights, len(examples), shares, seed, "examples")
        self._orders = Orders(self._make_order)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until as many examples were seen as there are; the last of them may reach into the next epoch."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def max_length(self) -> int:
        """The largest T of any batch, padding included."""
        return padded_length(int(self._lengths.max()), self._multiple)

    @property
    def longest_example(self) -> int:
        """Tokens of the longest example, as `max_length` without padding."""
        return int(self._lengths.max())

    def batch(self, step: int, shard: Shard = WHOLE) -> dict[str, np.ndarray]:
        """tokens int32 [B, T] and loss_mask bool [B, T] of a step, counted from 0; of a shard its rows alone, at the T
        of all."""
        indices = self._indices(step)
        rows = shard.rows(self.batch_size)
        length = padded_length(int(self._lengths[indices].max()), self._multiple)
        return pad([self.examples[int(i)] for i in indices[rows]], rows.stop - rows.start, length, self._pad_id)

    def padded(self, steps: int) -> tuple[int, np.ndarray]:
        """Of the first steps: their examples' tokens, and the T of each step, int [steps]."""
        lengths = self._lengths[self._places(0, steps)].reshape(steps, self.batch_size)
        return int(lengths.sum()), np.array([padded_length(int(n), self._multiple) for n in lengths.max(axis=1)])

    def describe(self, step: int) -> str:
        """The files and lines of a step's examples."""
        return describe(self.examples[int(i)].where for i in self._indices(step))

    def _indices(self, step: int) -> np.ndarray:
        if step < 0:
            raise ValueError(f"step {step}, expected 0 or more")
        return self._places(step, step + 1)

    def _places(self, first: int, last: int) -> np.ndarray:
        """Examples of the steps from `first` to before `last`: int [(last - first) * B]."""
        return self._orders.places(first * self.batch_size, last * self.batch_size, len(self.examples))

    def _make_order(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(1, epoch)))
        count, size = len(self.examples), self.batch_size
        order = random.permutation(count)
        if self._mixture is not None:
            order = self._mixture.drawn(epoch)[order]
        head = -(epoch * count) % size  # places of a batch that the epoch before began
        whole = (count - head) // size  # batches of this epoch alone
        if not self._group_by_length or whole < 1:
            return order
        if epoch == 0:
            longest = int(np.argmax(self._lengths[order]))
            order[[0, longest]] = order[[longest, 0]]
        middle = order[head : head + whole * size]
        stretches = [middle[i : i + _STRETCH * size] for i in range(0, len(middle), _STRETCH * size)]
        by_length = [part[np.argsort(-self._lengths[part], kind="stable")] for part in stretches]
        batches = random.permutation(np.concatenate(by_length).reshape(whole, size))
        if epoch == 0:
            first = int(np.argmax(self._lengths[batches].max(axis=1)))
            batches[[0, first]] = batches[[first, 0]]
        return np.concatenate([order[:head], batches.reshape(-1), order[head + whole * size :]])


class FileBatches:
    """Ready batches from an int32 .npy file [n, B, T]; every token but the first of a row is a target."""

    def __init__(self, path: str) -> None:
        """Raises InputError: the file is missing, is no .npy file, or has another dtype, rank, or a negative id.

        `content`: checksum of its rows.
        """
        self.path = path
        try:
            array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise InputError(f"data.batches: {path}: no such file") from error
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"data.batches: {path}: not a readable .npy file: {error}") from error
        if not isinstance(array, np.ndarray):
            raise InputError(f"data.batches: {path}: an .npz archive, expected one array saved with np.save")
        if array.dtype != np.int32:
            raise InputError(f"data.batches: {path}: dtype {array.dtype}, expected int32; save x.astype(np.int32)")
        if array.ndim != 3 or 0 in array.shape or array.shape[2] < 2:
            shape = list(array.shape)
            raise InputError(f"data.batches: {path}: shape {shape}, expected [n, B, T] with n, B >= 1 and T >= 2")
        self.max_token_id, content = -1, checksums.Running("int32", array.shape)
        for number, batch in enumerate(array):
            if batch.min() < 0:
                raise InputError(f"data.batches: {path}: batch {number} has the negative token id {batch.min()}")
            self.max_token_id = max(self.max_token_id, int(batch.max()))
            content.update(batch)
        self._array, self.content = array, content.result()
        self.batch_size = array.shape[1]

    def __len__(self) -> int:
        return self._array.shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """The file's batches; step n begins at the first again."""
        return len(self)

    @property
    def max_length(self) -> int:
        """T of every batch."""
        return self._array.shape[2]

    @property
    def longest_example(self) -> int:
        """T: rows of a file are whole."""
        return self.max_length

    def batch(self, step: int, shard: Shard = WHOLE) -> dict[str, np.ndarray]:
        """tokens int32 [B, T] and loss_mask bool [B, T] of a step, counted from 0; of a shard its rows alone."""
        if step < 0:
            raise ValueError(f"step {step}, expected 0 or more")
        tokens = np.array(self._array[step % len(self), shard.rows(self.batch_size)])
        loss_mask = np.ones(tokens.shape, np.bool_)
        loss_mask[:, 0] = False
        return {"tokens": tokens, "loss_mask": loss_mask}

    def describe(self, step: int) -> str:
        """The file and the number of a step's batch in it."""
        return f"{self.path}, batch {step % len(self)}"


def eval_batches(
    examples: Sequence[Example], batch_size: int, pad_to_multiple_of: int, pad_id: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, the longest first: tokens int32 [B, T] and loss_mask bool [B, T].

    The last batch is filled with rows of padding that have no target.
    """
    _check_sizes(batch_size, pad_to_multiple_of)
    lengths = lengths_of(examples)
    by_length = np.argsort(-lengths, kind="stable")
    for start in range(0, len(by_length), batch_size):
        rows = by_length[start : start + batch_size]
        length = padded_length(int(lengths[rows[0]]), pad_to_multiple_of)
        yield pad([examples[int(i)] for i in rows], batch_size, length, pad_id)


def pad(examples: Sequence[Example], rows: int, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Examples side by side: tokens int32 [rows, length] and loss_mask bool of that shape, padded at the end and
    below."""
    tokens = np.full((rows, length), pad_id, np.int32)
    loss_mask = np.zeros((rows, length), np.bool_)
    for row, example in enumerate(examples):
        tokens[row, : len(example)] = example.tokens
        loss_mask[row, : len(example)] = example.loss_mask
    return {"tokens": tokens, "loss_mask": loss_mask}


def describe(places: Iterable[str]) -> str:
    """Places as one text: "f, lines 1, 2; g, line 3"."""
    numbers: dict[str, list[str]] = {}
    for place in places:
        file_and_unit, _, number = place.rpartition(" ")
        numbers.setdefault(file_and_unit, []).append(number)
    return "; ".join(f"{place}{'s' * (len(at) > 1)} {', '.join(at)}" for place, at in numbers.items())


def padded_length(length: int, multiple: int) -> int:
    """T of a batch whose longest row has `length` tokens: a multiple of `multiple`. Each T is a program to compile, so
    rows of over _FINE tokens have only some eight of them for each doubling of the length, and more padding: less than
    an eighth."""
    blocks = -(-length // multiple)
    if length > _FINE:
        blocks = round_up(blocks, 1 << max((blocks - 1).bit_length() - 4, 0))
    return blocks * multiple


def round_up(length: Any, multiple: int) -> Any:
    """Of a number or an array of them."""
    return -(-length // multiple) * multiple


def _longest_first(group: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The group with its longest example in front."""
    at = int(np.argmax(lengths[group]))
    return np.concatenate([group[at : at + 1], np.delete(group, at)])


def _check_sizes(batch_size: int, pad_to_multiple_of: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}, expected at least 1")
    if pad_to_multiple_of < 1:
        raise InputError(f"data.pad_to_multiple_of is {pad_to_multiple_of}, expected at least 1")
