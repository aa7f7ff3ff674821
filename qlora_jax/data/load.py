"""The data of a run, read, checked and counted before its first step.

What a data set becomes under a tokenizer and a config's lengths is kept on disk (data/cache.py) and read from there
through a memory map: the rows are streamed into it, so a data set of any size needs the memory of a few thousand.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.data.batches import Batches, FileBatches, eval_batches
from qlora_jax.data.cache import Entry, cached, key_of
from qlora_jax.data.examples import Example, Truncated, tokenize_examples
from qlora_jax.data.formats import COLUMNS, Text, check_format, stream_texts
from qlora_jax.data.packing import PackedBatches, check_fits, pack_length, packed_eval_batches
from qlora_jax.data.padding import padding_line
from qlora_jax.data.read import data_files, stream_rows
from qlora_jax.data.rows import Row
from qlora_jax.data.split import split
from qlora_jax.data.store import lengths_of, targets_of, write_examples
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import InputError

# Padding comes after everything that attends to it and is no target, so any id that every vocabulary has will do.
PAD_ID = 0

_TEXTS = 4096  # that are tokenized at a time
# Keys of the config's `data` section that decide nothing about a data set's examples; a key that is not here does.
_AFTERWARDS = {
    "path", "batches", "group_by_length", "pad_to_multiple_of", "packing", "pack_length", "max_examples", "eval_path",
    "eval_examples", "seed",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """Training batches, the held-out examples and what makes batches of them, and lines that say what was loaded."""

    batches: Batches | PackedBatches | FileBatches
    heldout: Sequence[Example]
    report: list[str]
    truncated: dict[str, int] = dataclasses.field(default_factory=dict)  # examples that lost tokens, by piece
    pad_id: int = PAD_ID
    multiple: int = 1  # data.pad_to_multiple_of

    @property
    def is_packed(self) -> bool:
        """Whether batches have segments, those of `eval_batches` too."""
        return isinstance(self.batches, PackedBatches)

    def eval_batches(self, examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in batches like those of training."""
        if isinstance(self.batches, PackedBatches):
            return packed_eval_batches(examples, batch_size, self.batches.max_length, self.pad_id)
        return eval_batches(examples, batch_size, self.multiple, self.pad_id)


def load_data(config: Any, tokenizer: Tokenizer | None, batch_size: int, vocab_size: int) -> LoadedData:
    """Everything from the config's `data` section to batches.

    Args:
      config: the `data` section (configs/base.py explains its keys). `max_examples` takes the first examples of
        the data set; `batches` goes before `path`.
      tokenizer: of the model; may be None with `batches`.
      batch_size: sequences an optimizer step, B; a file of ready batches brings its own.
      vocab_size: rows of the model's embedding; every token id must be lower.

    Raises:
      InputError: whatever is wrong with config or data, in one line.
    """
    if config.batches:
        return _load_file(config.batches, batch_size, vocab_size)
    if tokenizer is None:
        raise InputError("the model's folder has no tokenizer, which data.path needs; only data.batches goes without")
    check_format(config.format)
    for name in ("max_examples", "seed", "pack_length"):
        if getattr(config, name) < 0:
            raise InputError(f"data.{name} is {getattr(config, name)}, expected 0 or more")
    entry = _read(config, config.path, config.max_examples, tokenizer, vocab_size)
    train: Sequence[Example] = entry.store
    heldout: Sequence[Example]
    if config.eval_path:
        heldout = _read(config, config.eval_path, config.eval_examples, tokenizer, vocab_size).store
    else:
        train, heldout = split(train, config.eval_examples, config.seed)
    batches = make_batches(config, train, batch_size)
    if isinstance(batches, PackedBatches) and heldout:
        check_fits(heldout, batches.max_length)
    report = _report(config, entry, train, heldout, batches)
    return LoadedData(batches, heldout, report, entry.facts["truncated"], multiple=config.pad_to_multiple_of)


def make_batches(config: Any, train: Sequence[Example], batch_size: int) -> Batches | PackedBatches:
    """As the config's `data` section packs or groups them."""
    if config.packing:
        return PackedBatches(train, batch_size, pack_length(config), PAD_ID, config.seed)
    return Batches(train, batch_size, config.group_by_length, config.pad_to_multiple_of, PAD_ID, config.seed)


def _read(config: Any, path: str, limit: int, tokenizer: Tokenizer, vocab_size: int) -> Entry:
    """The first `limit` examples (0: all) of a data set, from the cache or through it."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _AFTERWARDS} | {"limit": limit}
    files = data_files(path, config.revision)

    def build(file: Path) -> dict[str, Any]:
        counted = _Counts()
        texts = stream_texts(counted.rows(files, COLUMNS.get(config.format, ())), config.format)
        totals = write_examples(file, counted.examples(texts, limit, config, tokenizer))
        if not totals.examples:
            raise InputError(f"{path}: none of its {counted.found} rows has anything to learn")
        return dataclasses.asdict(totals) | {
            "rows": counted.found,
            "left_out": counted.left_out,
            "made": counted.made,
            "truncated": dataclasses.asdict(counted.truncated),
        }

    entry = cached(key_of(files, tokenizer.content(), settings), build)
    token = entry.facts["highest_token"]
    if token >= vocab_size:
        raise InputError(
            f"{entry.facts['highest_where']}: the tokenizer gives token id {token}, the model has embeddings for "
            f"{vocab_size} tokens: tokenizer and model do not belong together"
        )
    return entry


@dataclasses.dataclass
class _Counts:
    """The way from rows to examples, and what is counted on it."""

    found: int = 0  # rows
    left_out: int = 0  # of them, for want of an answer
    made: int = 0  # texts
    truncated: Truncated = Truncated()

    def rows(self, files: list[tuple[str, Path]], columns: Sequence[str]) -> Iterator[Row]:
        for label, file in files:
            for row in stream_rows(file, label, columns):
                self.found += 1
                yield row

    def examples(self, texts: Iterable[list[Text]], limit: int, config: Any, tokenizer: Tokenizer) -> Iterator[Example]:
        """All rows are read and checked, also those beyond the limit."""
        for some in itertools.batched(self._first(texts, limit), _TEXTS):
            examples, cut = tokenize_examples(
                some, tokenizer, config.max_source_len, config.max_target_len, config.train_on_source
            )
            yield from examples
            both = zip(dataclasses.astuple(self.truncated), dataclasses.astuple(cut), strict=True)
            self.truncated = Truncated(*(a + b for a, b in both))

    def _first(self, texts: Iterable[list[Text]], limit: int) -> Iterator[Text]:
        for of_row in texts:
            self.left_out += not of_row
            for text in of_row:
                self.made += 1
                if not limit or self.made <= limit:
                    yield text


def _load_file(path: str, batch_size: int, vocab_size: int) -> LoadedData:
    batches = FileBatches(path)
    if batches.max_token_id >= vocab_size:
        raise InputError(f"data.batches: {path} has token id {batches.max_token_id}, the model has {vocab_size} tokens")
    shape = f"{len(batches)} batches of {batches.batch_size} x {batches.max_length} tokens"
    report = [f"data: {path}: {shape}, every token but the first of a row a target"]
    if batches.batch_size != batch_size:
        report.append(f"data: steps of {batches.batch_size} sequences, as the file has them, not of {batch_size}")
    return LoadedData(batches, [], report)


def _report(
    config: Any,
    entry: Entry,
    train: Sequence[Example],
    heldout: Sequence[Example],
    batches: Batches | PackedBatches,
) -> list[str]:
    facts = entry.facts
    count, truncated = facts["examples"], facts["truncated"]
    targets, total = (int(of(train).sum(dtype=np.int64)) for of in (targets_of, lengths_of))
    lines = [f"data: {config.path} ({config.format}): {facts['rows']:,} rows, {count:,} examples"]
    if facts["left_out"]:
        lines.append(f"data: {facts['left_out']:,} rows left out: no answer to learn")
    if count < facts["made"]:
        lines.append(f"data: only the first {count:,} by data.max_examples")
    if any(truncated.values()):
        lines.append(
            f"data: cut to length: {truncated['sources']:,} sources (max_source_len {config.max_source_len}), "
            f"{truncated['targets']:,} targets (max_target_len {config.max_target_len})"
        )
    lines.append(
        f"data: train on {len(train):,} examples, {total:,} tokens, {targets:,} of them targets; "
        f"{len(heldout):,} held out; {batches.steps_per_epoch:,} steps an epoch"
    )
    lines.append(f"data: {padding_line(batches)}")
    lines.append(f"data: tokens {'kept' if entry.is_new else 'read from what is kept'} in {entry.folder}")
    return lines
