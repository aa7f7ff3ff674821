"""What a run takes where its user named a model and data and said nothing else: each choice a key of the config.

What was said stays as it is. What was chosen stands in config.json, so that the run can be repeated without this file.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from qlora_jax.data.detect import find_format
from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import FileBatches
from qlora_jax.feed.load import load_data
from qlora_jax.feed.packing import PackedBatches
from qlora_jax.feed.split import split
from qlora_jax.io.folder import resolve
from qlora_jax.io.load import load_config
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.sizes import linear_weights
from qlora_jax.settings import AUTO
from qlora_jax.text.added_tokens import extended_tokenizer
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.checks import check_values
from qlora_jax.train.setup import added_tokens
from qlora_jax.train.spec import longest_row

EXAMPLES = 16  # a step, as the paper has them up to 13B
PASSES, LEAST_STEPS, MOST_STEPS = 3, 50, 1875  # over the data; the paper's runs have 1,875 steps
HELD_OUT, MOST_HELD_OUT, LEAST_TO_HOLD_OUT = 0.05, 100, 40  # share of the examples, at most, and in how many at least
LARGE = 20e9  # weights from which the paper learns slower: 33B and 65B
SHORT_ROW = 512  # tokens of a packed row at least: short examples fill it better
PLANNED_LENGTH = 1024  # tokens of a row, for a plan without data


def fill(config: Any, given: Collection[str], say: Callable[[str], None]) -> None:
    """Chooses the keys of `config` that are not `given`, in place, by its model and its data.

    Args:
      config: a ConfigDict as qlora_jax/base.py, with model.path and data.path (or data.batches).
      given: keys that the user set.
      say: takes one line on the format, one on the rest.
    Raises:
      InputError: as a run with this config would, for model and data.
    """
    data, train = config.data, config.train
    _by_machine(config, given)
    if data.path and not data.batches:
        _format(config, given, say)
    folder = resolve(config.model.path, config.model.revision)
    sizes = load_config(folder)
    _by_size(config, sizes, given)
    _by_device(config, given)
    if data.batches:
        return
    if "data.packing" not in given:
        data.packing = config.model.attention != "cudnn"
    check_values(_without_batches(config))
    added = added_tokens(data, folder)
    tokenizer = Tokenizer.from_folder(folder) if added is None else extended_tokenizer(added)
    V = sizes.V if added is None else added.rows(sizes.V)
    whole = data.copy_and_resolve_references()
    if not data.eval_path:
        whole.eval_examples = 0
    loaded = load_data(whole, tokenizer, 1, V, sizes.context)
    assert not isinstance(loaded.batches, FileBatches)
    batches = loaded.batches
    if isinstance(batches, PackedBatches):
        if "data.pack_length" not in given and batches.max_length < min(SHORT_ROW, sizes.context):
            data.pack_length = min(SHORT_ROW, sizes.context)
            batches = PackedBatches(batches.examples, 1, data.pack_length, loaded.pad_id, data.seed)
        rows, form = batches.plan.rows, f"packed in rows of {batches.max_length:,} tokens"
    else:
        rows, form = len(batches.examples), "by themselves"
    examples = len(batches.examples)
    if "data.eval_examples" not in given and not data.eval_path:
        data.eval_examples = _held_out(batches.examples, data.seed)
    _batch(config, given, rows, examples)
    if "train.steps" not in given:
        rows_left = rows * (1 - (0 if data.eval_path else data.eval_examples) / examples)
        epoch = math.ceil(rows_left / train.batch_size)
        train.steps = max(LEAST_STEPS, min(MOST_STEPS, PASSES * epoch))
    held = f"{data.eval_examples:,} held out" if not data.eval_path else f"held out are those of {data.eval_path}"
    say(
        f"recipe: {examples:,} examples, {held}; {form}; {train.batch_size} rows a step (some "
        f"{round(train.batch_size * examples / rows):,} examples), {train.steps:,} steps, learning rate "
        f"{config.optimizer.learning_rate:g}, rank {config.lora.rank}; any key of the config can be set"
    )


def fill_for_plan(config: Any, sizes: ModelConfig, given: Collection[str], say: Callable[[str], None]) -> None:
    """As `fill`, as far as a plan needs it: memory depends on the longest row. Without data it is one of common length.

    Raises InputError for data that is not on this machine.
    """
    data = config.data
    _by_size(config, sizes, given)
    _by_device(config, given)
    if data.batches or {"data.max_source_len", "data.max_target_len", "data.pack_length", "data.packing"} & set(given):
        return
    data.packing = config.model.attention != "cudnn"
    if data.path:
        data.format = data.format if "data.format" in given else AUTO
        if data.packing and longest_row(config, sizes) < min(SHORT_ROW, sizes.context):
            data.pack_length = min(SHORT_ROW, sizes.context)
        return
    length = min(PLANNED_LENGTH, sizes.context)
    data.packing, data.pack_length = True, length
    say(f"plan: no data is named: rows of {length:,} tokens (data.pack_length)")


def _by_machine(config: Any, given: Collection[str]) -> None:
    if "model.compute_dtype" not in given and jax.default_backend() == "cpu":
        config.model.compute_dtype = "float32"  # what CPUs are fast at


def _format(config: Any, given: Collection[str], say: Callable[[str], None]) -> None:
    if "data.format" in given:
        return
    if config.data.streaming:  # of a set that is read file by file the format is found on the way
        config.data.format = AUTO
        return
    config.data.format = find_format(config.data.path, config.data.revision)
    say(f"data: {config.data.path} is read as {config.data.format}; data.format=NAME reads it as another")


def _by_size(config: Any, sizes: ModelConfig, given: Collection[str]) -> None:
    if linear_weights(sizes) < LARGE:
        return
    if "optimizer.learning_rate" not in given:
        config.optimizer.learning_rate = 1e-4
    if "lora.dropout" not in given:
        config.lora.dropout = 0.05


def _held_out(examples: Sequence[Example], seed: int) -> int:
    """How many of the examples to hold out: none of a few, nor where they are copies of each other."""
    wanted = min(MOST_HELD_OUT, int(HELD_OUT * len(examples))) if len(examples) >= LEAST_TO_HOLD_OUT else 0
    try:
        split(examples, wanted, seed, whole_rows=True)
    except InputError:
        return 0
    return wanted


def _batch(config: Any, given: Collection[str], rows: int, examples: int) -> None:
    """Rows a step that hold about EXAMPLES examples, no more than there are; how they are cut is left open."""
    train = config.train
    if "train.batch_size" not in given:
        wanted = max(1.0, EXAMPLES * rows / examples)
        train.batch_size = min(2 ** round(math.log2(wanted)), 2 ** int(math.log2(rows)))
        if "train.grad_accum" in given and train.grad_accum != AUTO:
            train.batch_size = train.grad_accum * math.ceil(train.batch_size / train.grad_accum)


def _by_device(config: Any, given: Collection[str]) -> None:
    """The cut into micro-batches, and what is kept of a layer, as the device's memory has it."""
    if "model.remat" not in given:
        config.model.remat = AUTO
    if "train.grad_accum" not in given:
        with config.ignore_type():
            config.train.grad_accum = AUTO


def _without_batches(config: Any) -> Any:
    """A copy to check while batch and micro-batches are not chosen yet."""
    copy = config.copy_and_resolve_references()
    with copy.ignore_type():
        copy.train.grad_accum = AUTO
    if copy.train.batch_size < 1:
        raise InputError(f"train.batch_size is {copy.train.batch_size}; expected at least 1")
    return copy
