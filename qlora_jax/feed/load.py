"""The data of a run, read, checked and counted before its first step.

What a data set becomes under a tokenizer and a config's lengths is kept on disk (feed/cache.py) and read from there
through a memory map: the rows are streamed into it, so a data set of any size needs the memory of a few thousand.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qlora_jax import checksums
from qlora_jax.checksums import Input
from qlora_jax.data.chat_examples import check_turns
from qlora_jax.data.detect import AUTO
from qlora_jax.data.examples import Example, Lengths, Truncated
from qlora_jax.data.formats import FORMATS
from qlora_jax.data.glue.tasks import FORMAT as GLUE
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, FileBatches, eval_batches
from qlora_jax.feed.labelled import labelled_lines
from qlora_jax.feed.orders import Shares
from qlora_jax.feed.packing import PackedBatches, check_fits, pack_length, packed_eval_batches
from qlora_jax.feed.padding import padding_line
from qlora_jax.feed.sources import Source, heldout_sources, sources_of
from qlora_jax.feed.split import split
from qlora_jax.feed.store import ExampleStore, lengths_of, parts_of, targets_of
from qlora_jax.feed.tokenized import Reading, TokenizedSet
from qlora_jax.text.tokenizer import Tokenizer

# Padding comes after everything that attends to it and is no target, so any id that every vocabulary has will do; the
# next that ends nothing is taken where this one is an end token.
PAD_ID = 0


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
    sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # data sets, for a machine to read
    shares: Shares | None = None  # of data sets in what is drawn, where data.weights says them

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
    sources = sources_of(config)
    check_turns(config.turns)
    for name in ("max_examples", "max_rows", "seed", "pack_length"):
        if getattr(config, name) < 0:
            raise InputError(f"data.{name} is {getattr(config, name)}, expected 0 or more")
    lengths = Lengths.of(config, context)
    reading = Reading(config, tokenizer, vocab_size, lengths)
    sets = [reading.read(source, config.max_examples) for source in sources]
    whole = ExampleStore.joined([each.store for each in sets])
    inputs = {"data.path": _together(sets)}
    train: Sequence[Example] = whole
    heldout: Sequence[Example]
    if config.eval_path:
        others = [reading.read(source, config.eval_examples) for source in heldout_sources(config)]
        heldout, inputs["data.eval_path"] = ExampleStore.joined([each.store for each in others]), _together(others)
    else:
        train, heldout = split(train, config.eval_examples, config.seed, any(each.chat for each in sets))
    shares = _shares(sources, train)
    pad_id = next(number for number in range(PAD_ID, vocab_size) if number not in tokenizer.eos_ids)
    longest = max(int(lengths_of(examples).max(initial=0)) for examples in (train, heldout))
    batches = make_batches(config, train, batch_size, longest, pad_id, shares)
    if isinstance(batches, PackedBatches) and heldout:
        check_fits(heldout, batches.max_length)
    report = _report(config, sets, train, heldout, batches, tokenizer, shares, lengths)
    cut = _truncated(sets)
    multiple = config.pad_to_multiple_of
    return LoadedData(batches, heldout, report, cut, pad_id, multiple, inputs, _sources(sets, train, shares), shares)


def longest_example(config: Any, tokenizer: Tokenizer, vocab_size: int, context: int) -> int:
    """Tokens of the longest example that `load_data` gives, trained on or held out; it goes through the same cache."""
    reading = Reading(config, tokenizer, vocab_size, Lengths.of(config, context))
    sets = [reading.read(source, config.max_examples) for source in sources_of(config)]
    if config.eval_path:
        sets += [reading.read(source, config.eval_examples) for source in heldout_sources(config)]
    return max(int(each.store.lengths.max(initial=0)) for each in sets)


def make_batches(
    config: Any,
    train: Sequence[Example],
    batch_size: int,
    longest: int,
    pad_id: int = PAD_ID,
    shares: Shares | None = None,
) -> Batches | PackedBatches:
    """As the config's `data` section packs or groups them; `longest`: tokens of the longest example, held-out ones
    counted too."""
    if config.packing:
        return PackedBatches(train, batch_size, pack_length(config, longest), pad_id, config.seed, shares)
    multiple = config.pad_to_multiple_of
    return Batches(train, batch_size, config.group_by_length, multiple, pad_id, config.seed, shares)


def _load_file(path: str, batch_size: int, vocab_size: int) -> LoadedData:
    batches = FileBatches(path)
    if batches.max_token_id >= vocab_size:
        raise InputError(f"data.batches: {path} has token id {batches.max_token_id}, the model has {vocab_size} tokens")
    shape = f"{len(batches)} batches of {batches.batch_size} x {batches.max_length} tokens"
    report = [f"data: {path}: {shape}, every token but the first of a row a target"]
    if batches.batch_size != batch_size:
        report.append(f"data: steps of {batches.batch_size} sequences, as the file has them, not of {batch_size}")
    return LoadedData(batches, [], report, inputs={"data.batches": Input(batches.content, [(path, batches.content)])})


def _together(sets: Sequence[TokenizedSet]) -> Input:
    """What several data sets are made from, as one key of the config stands for it."""
    if len(sets) == 1:
        return sets[0].input
    parts = dict.fromkeys(part for each in sets for part in each.input.parts)
    return Input(checksums.of(*(each.input.content for each in sets)), list(parts))


def _shares(sources: Sequence[Source], train: Sequence[Example]) -> Shares | None:
    weights = tuple(source.weight for source in sources if source.weight is not None)
    if not weights:
        return None
    return Shares(parts_of(train), weights, tuple(source.path for source in sources))


def _truncated(sets: Sequence[TokenizedSet]) -> dict[str, int]:
    """Examples that lost tokens, by piece."""
    total: Counter[str] = Counter()
    for each in sets:
        cuts = dataclasses.asdict(each.cuts)
        total.update({name: count for name, count in cuts.items() if isinstance(count, int)})
    return dict(total)


def _sources(sets: Sequence[TokenizedSet], train: Sequence[Example], shares: Shares | None) -> list[dict[str, Any]]:
    """Of each data set: rows, examples to train on, and its share of those that are drawn."""
    counts = np.bincount(parts_of(train), minlength=len(sets)).tolist()
    weights = [float(count) for count in counts] if shares is None else list(shares.weights)
    return [
        {
            "path": each.source.path,
            "format": each.format,
            "chat": each.chat,
            "rows": each.rows,
            "examples": len(each.store),
            "train_examples": count,
            "share": weight / sum(weights),
            "per_epoch": weight / sum(weights) * sum(counts) / max(count, 1),
        }
        for each, count, weight in zip(sets, counts, weights, strict=True)
    ]


def _report(
    config: Any,
    sets: Sequence[TokenizedSet],
    train: Sequence[Example],
    heldout: Sequence[Example],
    batches: Batches | PackedBatches,
    tokenizer: Tokenizer,
    shares: Shares | None,
    lengths: Lengths,
) -> list[str]:
    lines = []
    for each in sets:
        lines += _set_lines(config, each, lengths)
    if len(sets) > 1:
        for source in _sources(sets, train, shares):
            how = "once" if shares is None else f"{source['per_epoch']:.2f} times on average"
            lines.append(
                f"data: {source['share']:.1%} of the examples drawn are of {source['path']}: each of its "
                f"{source['train_examples']:,} {how} an epoch"
            )
    lines.append(_longest_line([train, heldout]))
    as_the_paper = not all(each.chat or each.format == GLUE for each in sets)
    if as_the_paper and tokenizer.bos_id is not None and not tokenizer.prefix:
        bos = tokenizer.controls.get(tokenizer.bos_id, "BOS")
        lines.append(f"data: prompts begin with {bos!r}, as the paper's do; the tokenizer itself adds nothing")
    targets, total = (int(of(train).sum(dtype=np.int64)) for of in (targets_of, lengths_of))
    lines.append(
        f"data: train on {len(train):,} examples, {total:,} tokens, {targets:,} of them targets; "
        f"{len(heldout):,} held out; {batches.steps_per_epoch:,} steps an epoch"
    )
    lines.append(f"data: {padding_line(batches)}")
    return lines + [line for each in sets for line in each.lines]


def _set_lines(config: Any, each: TokenizedSet, lengths: Lengths) -> list[str]:
    found = ", found from its rows" if each.source.format == AUTO else ""
    lines = [f"data: {each.source.path} ({each.format}{found}): {each.rows:,} rows, {len(each.store):,} examples"]
    is_labelled = each.format == GLUE
    if not is_labelled and FORMATS[each.format].note:
        lines.append(f"data: {FORMATS[each.format].note}")
    if each.chat:
        learned = "the last answer of each" if config.turns == "last" else "its answers alone"
        lines.append(f"data: in the model's chat template (data.template={config.template}), {learned} learned")
    if each.left_out and not is_labelled:
        lines.append(f"data: {each.left_out:,} rows left out: no answer to learn")
    if 0 < config.max_examples < each.made:
        lines.append(f"data: only the first {config.max_examples:,} by data.max_examples")
    if each.rows == config.max_rows:
        lines.append(f"data: at most {config.max_rows:,} rows are read, by data.max_rows")
    if is_labelled and isinstance(each.cuts, Truncated):
        return lines + labelled_lines(each.left_out, each.cuts.sources, lengths)
    return lines + each.cuts.report(lengths)


def _longest_line(examples: Sequence[Sequence[Example]]) -> str:
    """The longest example, whose batch takes the most memory, and how far it stands out."""
    longest = max(filter(len, examples), key=lambda some: int(lengths_of(some).max()))
    lengths = lengths_of(longest)
    at = int(np.argmax(lengths))
    most = int(np.quantile(np.concatenate([lengths_of(some) for some in examples if len(some)]), 0.99, method="higher"))
    return f"data: the longest example has {lengths[at]:,} tokens ({longest[at].where}); 99% have at most {most:,}"
