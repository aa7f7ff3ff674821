"""Rows of GLUE as an entry of the cache (feed/tokenized): what an encoder learns from."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_jax.data.examples import Example, Lengths, Truncated
from qlora_jax.data.glue.examples import as_label, tokenize_labelled
from qlora_jax.data.glue.rows import read_rows
from qlora_jax.data.glue.tasks import FORMAT, Task, task_of
from qlora_jax.data.read import data_sets
from qlora_jax.errors import InputError
from qlora_jax.feed.store import write_examples
from qlora_jax.text.tokenizer import Tokenizer

_ROWS = 4096  # that are tokenized at a time


def write_labelled(
    out: Path,
    files: list[tuple[str, Path]],
    task: Task,
    tokenizer: Tokenizer,
    lengths: Lengths,
    limit: int,
    max_rows: int,
) -> dict[str, Any]:
    """Writes the first `limit` examples (0: all) of the first `max_rows` rows, and returns the entry's facts.

    `highest_token` is of the texts: a label is no token of the vocabulary.

    Raises InputError: a row is wrong, or there is no room for one.
    """
    longest = longest_text(lengths)
    torn: list[str] = []
    rows, examples, cut, highest = 0, 0, 0, (-1, "")

    def made() -> Iterator[Example]:
        nonlocal rows, examples, cut, highest
        for some in itertools.batched(read_rows(task, files, torn, max_rows), _ROWS):
            rows += len(some)
            some = some[: limit - examples] if limit else some
            found, shorter = tokenize_labelled(some, tokenizer, task.classes, longest) if some else ([], 0)
            cut, examples = cut + shorter, examples + len(found)
            for example in found:
                highest = max(highest, (int(example.tokens[:-1].max()), example.where), key=lambda one: one[0])
                yield example

    totals = dataclasses.asdict(write_examples(out, made()))
    totals |= {"highest_token": highest[0], "highest_where": highest[1]}
    counts = {"rows": rows + len(torn), "left_out": len(torn), "made": rows}
    return totals | counts | {"chat": False, "format": FORMAT, "cuts": dataclasses.asdict(Truncated(sources=cut))}


def longest_text(lengths: Lengths) -> int:
    """Tokens of a row without its label. Raises InputError for lengths that an encoder's rows cannot have."""
    if lengths.max_target_len:
        raise InputError(
            f"data.max_target_len is {lengths.max_target_len}, but a row of GLUE has a label and no answer: leave it 0"
        )
    if lengths.max_source_len > lengths.context:
        raise InputError(
            f"data.max_source_len is {lengths.max_source_len}, but the model takes {lengths.context} tokens"
        )
    return lengths.max_source_len or lengths.context


def labelled_lines(left_out: int, cut: int, lengths: Lengths) -> list[str]:
    """For a run's report."""
    torn = [f"data: {left_out:,} lines left out, which the owners' file has torn apart"] if left_out else []
    room = "data.max_source_len" if lengths.max_source_len else "the model's context"
    said = f"data: {cut:,} rows cut to {longest_text(lengths)} tokens ({room}), the longer text of a pair first"
    return torn + [said] * bool(cut)


def labels_of(data: Any) -> Callable[[Example], str] | None:
    """What names the label of a row, by the config's `data` section; None where rows have answers."""
    if data.format != FORMAT:
        return None
    task = task_of(data.task, data_sets(data.path)[0])

    def named(example: Example) -> str:
        label = as_label(int(example.tokens[-1]), task.classes)
        return task.labels[int(label)] if task.labels else f"{label:g}"

    return named
