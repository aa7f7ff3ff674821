"""Examples in an Arrow file, read through a memory map: a set of any size takes memory for its lengths alone.

A file has record batches of some thousand examples with the columns

    tokens list<int32>, loss_mask list<uint8> (0 or 1), targets int32 (how many of loss_mask are 1), digest uint64 (of
    the tokens: copies share it), place int32, number int64 (`where` is places[place] + " " + number; -1 is none)

and beside it stands what does not grow with the examples: `Totals`. Of each example its lengths are held in memory, and
its place in the order of an epoch: some 30 bytes.
"""

import dataclasses
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qlora_jax import checksums
from qlora_jax.data.examples import Example

_BATCH_TOKENS = 2**21  # tokens of a record batch, at least: 10 MB


@dataclasses.dataclass
class Totals:
    """What is known of a file's examples, beside themselves."""

    examples: int = 0
    tokens: int = 0
    highest_token: int = -1
    highest_where: str = ""  # the example that has it
    places: list[str] = dataclasses.field(default_factory=list)  # what `where` begins with: "FILE, line"
    content: str = ""  # checksum of all tokens and masks, in order: whatever file, whatever batches they are in


class ExampleStore(Sequence[Example]):
    """The examples of a file, or some of them in an order; each is a view of the memory map.

    Attributes:
      lengths: int32 [n], tokens of each example. targets: int32 [n], how many of them are learned.
    """

    def __init__(self, file: "_File | _Files", indices: np.ndarray | None = None):
        self._file, self._indices = file, indices
        cut = slice(None) if indices is None else indices
        self.lengths, self.targets = file.lengths[cut], file.targets[cut]

    @classmethod
    def open(cls, path: Path, places: Sequence[str]) -> "ExampleStore":
        """Raises ValueError or OSError (pyarrow's errors are these) for a file that is not whole."""
        return cls(_File(path, places))

    @classmethod
    def joined(cls, stores: Sequence["ExampleStore"]) -> "ExampleStore":
        """The examples of whole files, one file after the other."""
        assert all(store._indices is None for store in stores)
        return cls(_Files([store._file for store in stores]))

    def parts(self) -> np.ndarray:
        """int [n]: of which of the joined stores each example is."""
        found = self._file.parts()
        return found if self._indices is None else found[self._indices]

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "ExampleStore": ...
    def __getitem__(self, index: int | slice) -> "Example | ExampleStore":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        return self._file.example(index if self._indices is None else int(self._indices[index]))

    def take(self, indices: np.ndarray) -> "ExampleStore":
        """The examples at `indices`, int [m], in that order."""
        return ExampleStore(self._file, indices if self._indices is None else self._indices[indices])

    def rows(self) -> np.ndarray:
        """int64 [n]: equal for examples of the same row of a data file."""
        places, numbers = self._file.column("place").astype(np.int64), self._file.column("number")
        found = np.where(numbers < 0, -1 - np.arange(len(numbers)), (places << 40) + numbers)
        return found if self._indices is None else found[self._indices]

    def digests(self) -> np.ndarray:
        """uint64 [n]: equal for examples with the same tokens."""
        found = self._file.column("digest")
        return found if self._indices is None else found[self._indices]


class _File:
    """The memory map and the views of its record batches."""

    def __init__(self, path: Path, places: Sequence[str]):
        import pyarrow as pa

        self.places = places
        self._map = pa.memory_map(str(path))
        self._reader = pa.ipc.open_file(self._map)
        count = self._reader.num_record_batches
        self._batches: list[_Views | None] = [None] * count
        sizes = [self._reader.get_batch(number).num_rows for number in range(count)]
        self._ends = np.cumsum(sizes).tolist()
        offsets = [self._reader.get_batch(number).column("tokens").offsets for number in range(count)]
        lengths = [np.diff(of_batch.to_numpy()) for of_batch in offsets]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
        self.targets = self.column("targets")

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, copied: [n]."""
        parts = [
            self._reader.get_batch(number).column(name).to_numpy() for number in range(self._reader.num_record_batches)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def parts(self) -> np.ndarray:
        return np.zeros(len(self.lengths), np.int64)

    def example(self, index: int) -> Example:
        number = bisect_right(self._ends, index)
        views = self._batches[number]
        if views is None:
            views = self._batches[number] = _Views(self._reader.get_batch(number))
        at = index - (self._ends[number - 1] if number else 0)
        place = slice(views.offsets[at], views.offsets[at + 1])
        where, row = self.places[views.places[at]], int(views.numbers[at])
        return Example(views.tokens[place], views.loss_mask[place], where if row < 0 else f"{where} {row}")


class _Files:
    """Several files as one: what _File has, one after the other."""

    def __init__(self, files: Sequence["_File | _Files"]):
        self._files = files
        self._ends = np.cumsum([len(file.lengths) for file in files]).tolist()
        self.places: list[str] = [place for file in files for place in file.places]
        self.lengths: np.ndarray = np.concatenate([file.lengths for file in files])
        self.targets: np.ndarray = np.concatenate([file.targets for file in files])

    def column(self, name: str) -> np.ndarray:
        columns = [file.column(name) for file in self._files]
        if name == "place":  # numbers of places count on from file to file
            begins = np.cumsum([0, *(len(file.places) for file in self._files)])
            columns = [column + begin for column, begin in zip(columns, begins[:-1], strict=True)]
        return np.concatenate(columns)

    def parts(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._files)), [len(file.lengths) for file in self._files])

    def example(self, index: int) -> Example:
        number = bisect_right(self._ends, index)
        return self._files[number].example(index - (self._ends[number - 1] if number else 0))


class _Views:
    """A record batch as numpy arrays that lie in the map."""

    def __init__(self, batch: Any):
        tokens, loss_mask = batch.column("tokens"), batch.column("loss_mask")
        self.offsets = tokens.offsets.to_numpy(zero_copy_only=True)
        self.tokens = tokens.values.to_numpy(zero_copy_only=True)
        self.loss_mask = loss_mask.values.to_numpy(zero_copy_only=True).view(np.bool_)
        self.places = batch.column("place").to_numpy(zero_copy_only=True)
        self.numbers = batch.column("number").to_numpy(zero_copy_only=True)


def write_examples(path: Path, examples: Iterable[Example]) -> Totals:
    """Writes a file for `ExampleStore.open`, a record batch at a time, and waits for the disk.

    Raises OSError when the disk is full.
    """
    import pyarrow as pa

    totals = Totals()
    numbers: dict[str, int] = {}  # of places
    content = _Content()
    with path.open("wb") as file:
        with pa.ipc.new_file(file, _schema()) as writer:
            pending: list[Example] = []
            size = 0
            for example in examples:
                pending.append(example)
                size += len(example)
                if size >= _BATCH_TOKENS:
                    writer.write_batch(_record_batch(pending, numbers, totals, content))
                    pending, size = [], 0
            if pending:
                writer.write_batch(_record_batch(pending, numbers, totals, content))
        file.flush()
        os.fsync(file.fileno())
    totals.places, totals.content = list(numbers), content.result()
    return totals


class _Content:
    """Checksum of examples that come in any portions: a column each of lengths, tokens and masks."""

    def __init__(self) -> None:
        self._columns = [checksums.Running(name, ()) for name in ("lengths", "tokens", "masks")]

    def update(self, *columns: np.ndarray) -> None:
        for running, column in zip(self._columns, columns, strict=True):
            running.update(column)

    def result(self) -> str:
        return checksums.of(*(running.result() for running in self._columns))


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "tokens": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.uint8()),
            "targets": pa.int32(),
            "digest": pa.uint64(),
            "place": pa.int32(),
            "number": pa.int64(),
        }
    )


def _record_batch(examples: Sequence[Example], numbers: dict[str, int], totals: Totals, content: _Content) -> Any:
    import pyarrow as pa

    lengths = [len(example) for example in examples]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    tokens = np.concatenate([example.tokens for example in examples])
    loss_mask = np.concatenate([example.loss_mask for example in examples])
    content.update(np.array(lengths, np.int32), tokens, loss_mask.view(np.uint8))
    places, rows = zip(*(_split_where(example.where) for example in examples), strict=True)
    targets = np.add.reduceat(loss_mask, np.cumsum([0, *lengths[:-1]]), dtype=np.int32)
    totals.examples += len(examples)
    totals.tokens += len(tokens)
    if int(tokens.max()) > totals.highest_token:
        highest = int(np.argmax(tokens))
        totals.highest_token = int(tokens[highest])
        totals.highest_where = examples[int(np.searchsorted(np.cumsum(lengths), highest, "right"))].where
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(tokens)),
        pa.ListArray.from_arrays(offsets, pa.array(loss_mask.view(np.uint8))),
        pa.array(targets),
        pa.array(digests_of(examples)),
        pa.array([numbers.setdefault(place, len(numbers)) for place in places], pa.int32()),
        pa.array(rows, pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_schema())


def _split_where(where: str) -> tuple[str, int]:
    """("FILE, line", 12) of "FILE, line 12"; -1 where there is no number at the end."""
    place, _, number = where.rpartition(" ")
    return (place, int(number)) if number.isascii() and number.isdigit() else (where, -1)


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """int [n]: tokens of each example, without reading the examples of a store."""
    return examples.lengths if isinstance(examples, ExampleStore) else np.array([len(e) for e in examples], np.int64)


def targets_of(examples: Sequence[Example]) -> np.ndarray:
    """int [n]: tokens of each example that are learned."""
    if isinstance(examples, ExampleStore):
        return examples.targets
    return np.array([np.count_nonzero(e.loss_mask) for e in examples], np.int64)


def digests_of(examples: Sequence[Example]) -> np.ndarray:
    """uint64 [n]: equal for examples with the same tokens, and for others with a chance of 3 in a million that any two
    of 10 million are."""
    if isinstance(examples, ExampleStore):
        return examples.digests()
    data = b"".join(hashlib.blake2b(np.ascontiguousarray(e.tokens), digest_size=8).digest() for e in examples)
    return np.frombuffer(data, np.uint64)


def rows_of(examples: Sequence[Example]) -> np.ndarray:
    """int64 [n]: equal for examples of the same row of a data file (of the same `where`, if it ends with a number)."""
    if isinstance(examples, ExampleStore):
        return examples.rows()
    numbers: dict[str, int] = {}
    named = [example.where if _split_where(example.where)[1] >= 0 else f"\n{n}" for n, example in enumerate(examples)]
    return np.array([numbers.setdefault(where, len(numbers)) for where in named], np.int64)


def parts_of(examples: Sequence[Example]) -> np.ndarray:
    """int64 [n]: of which of the joined stores each example is; 0 of a list."""
    return examples.parts() if isinstance(examples, ExampleStore) else np.zeros(len(examples), np.int64)


def take(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """The examples at `indices`: of a store another view, of a list a list."""
    return examples.take(indices) if isinstance(examples, ExampleStore) else [examples[i] for i in indices.tolist()]
