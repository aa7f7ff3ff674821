"""The data of a run, read, checked and counted before its first step."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.batches import Batches, FileBatches
from qlora_jax.data.chat_examples import ChatCuts, tokenize_chats, uses_chat_template
from qlora_jax.data.examples import Example, Truncated, tokenize_examples
from qlora_jax.data.formats import COLUMNS, check_format, format_chats, format_rows
from qlora_jax.data.read import read_rows
from qlora_jax.data.split import split
from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import InputError

# Padding comes after everything that attends to it and is no target, so any id that every vocabulary has will do; the
# next that ends nothing is taken where this one is an end token.
PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """Training batches, the held-out examples (for `eval_batches`), and lines that say what was loaded."""

    batches: Batches | FileBatches
    heldout: list[Example]
    report: list[str]
    pad_id: int = PAD_ID


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
    for name in ("max_examples", "seed"):
        if getattr(config, name) < 0:
            raise InputError(f"data.{name} is {getattr(config, name)}, expected 0 or more")
    rows = read_rows(config.path, config.revision, COLUMNS.get(config.format, ()))
    found = len(rows)
    chat = uses_chat_template(config.template, config.format, tokenizer)
    # All rows are checked, also those that max_examples leaves aside.
    texts, left_out = (format_chats if chat else format_rows)(rows, config.format)
    made = len(texts)
    if config.max_examples:
        texts = texts[: config.max_examples]
    if not texts:
        raise InputError(f"{config.path}: none of its {found} rows has anything to learn")
    examples, truncated = _tokenize(texts, tokenizer, config)
    _check_ids(examples, vocab_size)
    if config.eval_path:
        train, heldout = examples, _read_heldout(config, tokenizer, vocab_size)
    else:
        train, heldout = split(examples, config.eval_examples, config.seed)
    pad_id = next(number for number in range(PAD_ID, vocab_size) if number not in tokenizer.eos_ids)
    batches = Batches(train, batch_size, config.group_by_length, config.pad_to_multiple_of, pad_id, config.seed)
    report = _report(config, found, left_out, made, len(texts), truncated, examples, train, heldout, batches)
    return LoadedData(batches, heldout, report, pad_id)


def _read_heldout(config: Any, tokenizer: Tokenizer, vocab_size: int) -> list[Example]:
    """The first eval_examples (0: all) of a file of its own."""
    chat = uses_chat_template(config.template, config.format, tokenizer)
    rows = read_rows(config.eval_path, config.revision, COLUMNS.get(config.format, ()))
    texts, _ = (format_chats if chat else format_rows)(rows, config.format)
    examples, _ = _tokenize(texts[: config.eval_examples] if config.eval_examples else texts, tokenizer, config)
    _check_ids(examples, vocab_size)
    return examples


def _tokenize(texts: Any, tokenizer: Tokenizer, config: Any) -> tuple[list[Example], Truncated | ChatCuts]:
    """Examples of what format_chats or format_rows gave."""
    if not uses_chat_template(config.template, config.format, tokenizer):
        lengths = config.max_source_len, config.max_target_len
        return tokenize_examples(texts, tokenizer, *lengths, config.train_on_source)
    try:
        day = datetime.date.fromisoformat(config.template_date)
    except ValueError as error:
        raise InputError(f"data.template_date is {config.template_date!r}; expected a day as YYYY-MM-DD") from error
    room = config.max_source_len + config.max_target_len
    examples, cuts = tokenize_chats(texts, tokenizer, room, config.train_on_source, day)
    if not examples and cuts.dropped:
        raise InputError(
            f"none of the {cuts.dropped:,} chats has room for an answer in data.max_source_len + data.max_target_len = "
            f"{room} tokens; make them larger"
        )
    return examples, cuts


def _load_file(path: str, batch_size: int, vocab_size: int) -> LoadedData:
    batches = FileBatches(path)
    if batches.max_token_id >= vocab_size:
        raise InputError(f"data.batches: {path} has token id {batches.max_token_id}, the model has {vocab_size} tokens")
    shape = f"{len(batches)} batches of {batches.batch_size} x {batches.max_length} tokens"
    report = [f"data: {path}: {shape}, every token but the first of a row a target"]
    if batches.batch_size != batch_size:
        report.append(f"data: steps of {batches.batch_size} sequences, as the file has them, not of {batch_size}")
    return LoadedData(batches, [], report)


def _check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    highest = max(examples, key=lambda example: int(example.tokens.max()))
    token = int(highest.tokens.max())
    if token >= vocab_size:
        raise InputError(
            f"{highest.where}: the tokenizer gives token id {token}, the model has embeddings for {vocab_size} tokens: "
            "tokenizer and model do not belong together"
        )


def _report(
    config: Any,
    found: int,
    left_out: int,
    made: int,
    taken: int,
    truncated: Truncated | ChatCuts,
    examples: Sequence[Example],
    train: Sequence[Example],
    heldout: Sequence[Example],
    batches: Batches,
) -> list[str]:
    targets = sum(int(np.count_nonzero(example.loss_mask)) for example in train)
    total = sum(len(example) for example in train)
    lines = [f"data: {config.path} ({config.format}): {found:,} rows, {len(examples):,} examples"]
    if isinstance(truncated, ChatCuts):
        lines.append(f"data: in the model's chat template (data.template={config.template}), its answers alone learned")
    if left_out:
        lines.append(f"data: {left_out:,} rows left out: no answer to learn")
    if taken < made:
        lines.append(f"data: only the first {taken:,} by data.max_examples")
    lines += truncated.report(config)
    lines.append(
        f"data: train on {len(train):,} examples, {total:,} tokens, {targets:,} of them targets; "
        f"{len(heldout):,} held out; {batches.steps_per_epoch:,} steps an epoch"
    )
    return lines
