"""The data of a run, read, checked and counted before its first step.

What a data set becomes under a tokenizer and a config's lengths is kept on disk (feed/cache.py) and read from there
through a memory map: the rows are streamed into it, so a data set of any size needs the memory of a few thousand.
"""

import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax import checksums
from qlora_jax.checksums import Input
from qlora_jax.data.chat_examples import ChatCuts, check_turns, tokenize_chats, uses_chat_template
from qlora_jax.data.detect import AUTO, find_format
from qlora_jax.data.examples import Example, Lengths, Truncated, tokenize_examples
from qlora_jax.data.formats import COLUMNS, check_format, stream_chats, stream_texts
from qlora_jax.data.read import data_files, stream_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, FileBatches, eval_batches
from qlora_jax.feed.cache import Entry, cached, contents, key_of
from qlora_jax.feed.packing import PackedBatches, check_fits, pack_length, packed_eval_batches
from qlora_jax.feed.padding import padding_line
from qlora_jax.feed.split import split
from qlora_jax.feed.store import lengths_of, targets_of, write_examples
from qlora_jax.text.tokenizer import Tokenizer

# Padding comes after everything that attends to it and is no target, so any id that every vocabulary has will do; the
# next that ends nothing is taken where this one is an end token.
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
    inputs: dict[str, Input] = dataclasses.field(default_factory=dict)  # by the config's keys that name files

    @property
    def is_packed(self) -> bool:
        """Whether batches have segments, those of `eval_batches` too."""
        return isinstance(self.batches, PackedBatches)

    def eval_batches(self, examples: Sequence[Example], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Every example once, in batches like those of training."""
        if isinstance(self.batches, PackedBatches):
            return packed_eval_batches(examples, batch_size, self.batches.max_length, self.pad_id)
        return eval_batches(examples, batch_size, self.multiple, self.pad_id)


def load_data(
    config: Any, tokenizer: Tokenizer | None, batch_size: int, vocab_size: int, context: int | None = None
) -> LoadedData:
    """Everything from the config's `data` section to batches.

    Args:
      config: the `data` section (configs/base.py explains its keys). `max_examples` takes the first examples of
        the data set; `batches` goes before `path`.
      tokenizer: of the model; may be None with `batches`.
      batch_size: sequences an optimizer step, B; a file of ready batches brings its own.
      vocab_size: rows of the model's embedding; every token id must be lower.
      context: tokens that the model was made for: what examples are cut to where the config gives no lengths. None is
        not known: then they are whole.

    Raises:
      InputError: whatever is wrong with config or data, in one line.
    """
    if config.batches:
        return _load_file(config.batches, batch_size, vocab_size)
    if tokenizer is None:
        raise InputError("the model's folder has no tokenizer, which data.path needs; only data.batches goes without")
    if config.format != AUTO:
        check_format(config.format)
    check_turns(config.turns)
    for name in ("max_examples", "seed", "pack_length"):
        if getattr(config, name) < 0:
            raise InputError(f"data.{name} is {getattr(config, name)}, expected 0 or more")
    lengths = Lengths.of(config, context)
    entry = _read(config, config.path, config.max_examples, tokenizer, vocab_size, lengths)
    inputs = {"data.path": entry.input}
    train: Sequence[Example] = entry.store
    heldout: Sequence[Example]
    if config.eval_path:
        other = _read(config, config.eval_path, config.eval_examples, tokenizer, vocab_size, lengths)
        heldout, inputs["data.eval_path"] = other.store, other.input
    else:
        train, heldout = split(train, config.eval_examples, config.seed, entry.facts["chat"])
    pad_id = next(number for number in range(PAD_ID, vocab_size) if number not in tokenizer.eos_ids)
    longest = max(int(lengths_of(examples).max(initial=0)) for examples in (train, heldout))
    batches = make_batches(config, train, batch_size, longest, pad_id)
    if isinstance(batches, PackedBatches) and heldout:
        check_fits(heldout, batches.max_length)
    report = _report(config, entry, train, heldout, batches, tokenizer)
    return LoadedData(batches, heldout, report, entry.facts["truncated"], pad_id, config.pad_to_multiple_of, inputs)


def longest_example(config: Any, tokenizer: Tokenizer, vocab_size: int, context: int) -> int:
    """Tokens of the longest example that `load_data` gives, trained on or held out; it goes through the same cache."""
    lengths = Lengths.of(config, context)
    sets = [(config.path, config.max_examples)]
    if config.eval_path:
        sets.append((config.eval_path, config.eval_examples))
    entries = [_read(config, path, limit, tokenizer, vocab_size, lengths) for path, limit in sets]
    return max(int(entry.store.lengths.max()) for entry in entries)


def make_batches(
    config: Any, train: Sequence[Example], batch_size: int, longest: int, pad_id: int = PAD_ID
) -> Batches | PackedBatches:
    """As the config's `data` section packs or groups them; `longest`: tokens of the longest example, held-out ones
    counted too."""
    if config.packing:
        return PackedBatches(train, batch_size, pack_length(config, longest), pad_id, config.seed)
    return Batches(train, batch_size, config.group_by_length, config.pad_to_multiple_of, pad_id, config.seed)


def _read(config: Any, path: str, limit: int, tokenizer: Tokenizer, vocab_size: int, lengths: Lengths) -> Entry:
    """The first `limit` examples (0: all) of a data set, from the cache or through it."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _AFTERWARDS} | {"limit": limit}
    if not lengths.are_given:
        settings["context"] = lengths.context
    files = data_files(path, config.revision)
    format = config.format if config.format != AUTO else find_format(path, config.revision)
    settings["format"] = format
    chat = uses_chat_template(config.template, format, tokenizer)
    if config.turns != "all" and not chat:
        raise InputError(
            f"data.turns is {config.turns!r}, which is for chats in a model's chat template; here data.template="
            f"{config.template} takes the paper's prompts (data.template=chat takes the model's)"
        )
    tokenize = (_chat_tokenizer if chat else _pair_tokenizer)(config, tokenizer, lengths)

    def build(file: Path) -> dict[str, Any]:
        counted = _Counts(ChatCuts() if chat else Truncated())
        rows = counted.rows(files, COLUMNS.get(format, ()))
        made = (stream_chats if chat else stream_texts)(rows, format)
        totals = write_examples(file, counted.examples(made, limit, tokenize))
        cuts = counted.cuts
        if not totals.examples and cuts.dropped:
            what = "chats has room for an answer" if chat else "examples has room for a token to learn"
            raise InputError(f"{path}: none of its {cuts.dropped:,} {what} in {lengths}; make it larger")
        if not totals.examples:
            raise InputError(f"{path}: none of its {counted.found} rows has anything to learn")
        return dataclasses.asdict(totals) | {
            "rows": counted.found,
            "left_out": counted.left_out,
            "made": counted.made,
            "chat": chat,
            "format": format,
            "truncated": {name: count for name, count in dataclasses.asdict(cuts).items() if isinstance(count, int)},
            "cuts": _cut_lines(cuts, lengths),
        }

    hashed = contents(files)
    entry = cached(key_of(hashed, tokenizer.content(), settings), build)
    facts = entry.facts
    token = facts["highest_token"]
    if token >= vocab_size:
        raise InputError(
            f"{facts['highest_where']}: the tokenizer gives token id {token}, the model has embeddings for "
            f"{vocab_size} tokens: tokenizer and model do not belong together"
        )
    template = json.dumps(tokenizer.chat_template).encode()
    parts = [*hashed, ("the tokenizer", checksums.of(tokenizer.content().replace(template, b"")))]
    parts += [("the chat template", checksums.of(template))] if chat else []
    return dataclasses.replace(entry, parts=parts)


def _pair_tokenizer(config: Any, tokenizer: Tokenizer, lengths: Lengths) -> Callable[..., tuple[list[Example], Any]]:
    return lambda texts: tokenize_examples(texts, tokenizer, lengths, config.train_on_source)


def _chat_tokenizer(config: Any, tokenizer: Tokenizer, lengths: Lengths) -> Callable[..., tuple[list[Example], Any]]:
    if not lengths.are_given and (lengths.max_source_len or lengths.max_target_len):
        raise InputError(
            f"data.max_source_len is {lengths.max_source_len} and data.max_target_len {lengths.max_target_len}, but "
            "the turns of a chat have room for both together: give both, or leave both at 0"
        )
    try:
        day = datetime.date.fromisoformat(config.template_date)
    except ValueError as error:
        raise InputError(f"data.template_date is {config.template_date!r}; expected a day as YYYY-MM-DD") from error
    return lambda chats: tokenize_chats(chats, tokenizer, lengths.room, config.train_on_source, day, config.turns)


def _cut_lines(cuts: Truncated | ChatCuts, lengths: Lengths) -> list[str]:
    if isinstance(cuts, Truncated) or lengths.are_given:
        return cuts.report(lengths)
    lines = dataclasses.replace(cuts, shortened=0, cut=0, dropped=0).report(lengths)
    if cuts.shortened or cuts.cut or cuts.dropped:
        lines.append(
            f"data: cut to length ({lengths}): {cuts.shortened:,} chats end at an earlier answer, {cuts.cut:,} first "
            f"answers cut (learned without an end), {cuts.dropped:,} without room dropped"
        )
    return lines


@dataclasses.dataclass
class _Counts:
    """The way from rows to examples, and what is counted on it."""

    cuts: Any  # Truncated or ChatCuts, all blocks together
    found: int = 0  # rows
    left_out: int = 0  # of them, for want of an answer
    made: int = 0  # texts or chats

    def rows(self, files: list[tuple[str, Path]], columns: Sequence[str]) -> Iterator[Row]:
        for label, file in files:
            for row in stream_rows(file, label, columns):
                self.found += 1
                yield row

    def examples(
        self, made: Iterable[list[Any]], limit: int, tokenize: Callable[..., tuple[list[Example], Any]]
    ) -> Iterator[Example]:
        """All rows are read and checked, also those beyond the limit."""
        for some in itertools.batched(self._first(made, limit), _TEXTS):
            examples, cuts = tokenize(some)
            yield from examples
            self.cuts += cuts

    def _first(self, made: Iterable[list[Any]], limit: int) -> Iterator[Any]:
        for of_row in made:
            self.left_out += not of_row
            for one in of_row:
                self.made += 1
                if not limit or self.made <= limit:
                    yield one


def _load_file(path: str, batch_size: int, vocab_size: int) -> LoadedData:
    batches = FileBatches(path)
    if batches.max_token_id >= vocab_size:
        raise InputError(f"data.batches: {path} has token id {batches.max_token_id}, the model has {vocab_size} tokens")
    shape = f"{len(batches)} batches of {batches.batch_size} x {batches.max_length} tokens"
    report = [f"data: {path}: {shape}, every token but the first of a row a target"]
    if batches.batch_size != batch_size:
        report.append(f"data: steps of {batches.batch_size} sequences, as the file has them, not of {batch_size}")
    return LoadedData(batches, [], report, inputs={"data.batches": Input(batches.content, [(path, batches.content)])})


def _report(
    config: Any,
    entry: Entry,
    train: Sequence[Example],
    heldout: Sequence[Example],
    batches: Batches | PackedBatches,
    tokenizer: Tokenizer,
) -> list[str]:
    facts = entry.facts
    targets, total = (int(of(train).sum(dtype=np.int64)) for of in (targets_of, lengths_of))
    found = ", found from its rows" if config.format == AUTO else ""
    lines = [f"data: {config.path} ({facts['format']}{found}): {facts['rows']:,} rows, {facts['examples']:,} examples"]
    if facts["chat"]:
        learned = "the last answer of each" if config.turns == "last" else "its answers alone"
        lines.append(f"data: in the model's chat template (data.template={config.template}), {learned} learned")
    if facts["left_out"]:
        lines.append(f"data: {facts['left_out']:,} rows left out: no answer to learn")
    if 0 < config.max_examples < facts["made"]:
        lines.append(f"data: only the first {config.max_examples:,} by data.max_examples")
    lines += [*facts["cuts"], _longest_line([train, heldout])]
    if not facts["chat"] and tokenizer.bos_id is not None and not tokenizer.prefix:
        bos = tokenizer.controls.get(tokenizer.bos_id, "BOS")
        lines.append(f"data: prompts begin with {bos!r}, as the paper's do; the tokenizer itself adds nothing")
    lines.append(
        f"data: train on {len(train):,} examples, {total:,} tokens, {targets:,} of them targets; "
        f"{len(heldout):,} held out; {batches.steps_per_epoch:,} steps an epoch"
    )
    lines.append(f"data: {padding_line(batches)}")
    lines.append(f"data: tokens {'kept' if entry.is_new else 'read from what is kept'} in {entry.folder}")
    return lines


def _longest_line(examples: Sequence[Sequence[Example]]) -> str:
    """The longest example, whose batch takes the most memory, and how far it stands out."""
    longest = max(filter(len, examples), key=lambda some: int(lengths_of(some).max()))
    lengths = lengths_of(longest)
    at = int(np.argmax(lengths))
    most = int(np.quantile(np.concatenate([lengths_of(some) for some in examples if len(some)]), 0.99, method="higher"))
    return f"data: the longest example has {lengths[at]:,} tokens ({longest[at].where}); 99% have at most {most:,}"
