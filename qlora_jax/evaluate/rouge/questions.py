"""What is asked, and which answers are right: Super-NaturalInstructions, or rows of an input and its outputs."""

import dataclasses
from collections.abc import Iterable

from qlora_jax.data.fields import objects, text
from qlora_jax.data.forms.super_natural import chosen, definition_of, outputs, prompts, shown_examples
from qlora_jax.data.read import data_files, stream_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Question:
    """prompts: the longest first; the first that fits is asked. references: at least one."""

    task: str
    prompts: tuple[str, ...]
    references: tuple[str, ...]
    where: str


def read_questions(path: str, most: int = 0) -> list[Question]:
    """Questions of a list of tasks, of one task's file, or of rows {input, output: text or texts, task?}.

    most: of each task; 0: all, of a task of Super-NaturalInstructions those that the format takes.

    Raises InputError: the file or a row is not of these forms, or there is no question.
    """
    found: list[Question] = []
    counts: dict[str, int] = {}
    for label, file in data_files(path):
        for row in stream_rows(file, label):
            for question in _of_row(row):
                counts[question.task] = counts.get(question.task, 0) + 1
                if not most or counts[question.task] <= most:
                    found.append(question)
    if not found:
        raise InputError(f"{path} has no question with an answer to compare with")
    return found


def _of_row(row: Row) -> Iterable[Question]:
    name = row.file.rpartition(" ")[2].rpartition("/")[2].removesuffix(".json")
    if "Instances" not in row.fields:
        asked = text(row, "input", blank=True)
        task = text(row, "task", optional=True) or name
        yield Question(task, (asked,), tuple(outputs(row)), row.where)
        return
    definition, shown = definition_of(row), shown_examples(row)
    for instance in chosen(objects(row, "Instances"), row.file):
        asked = text(instance, "input", blank=True)
        yield Question(name, tuple(prompts(definition, shown, asked)), tuple(outputs(instance)), row.where)


def prompt_of(question: Question, tokenizer: Tokenizer, longest: int) -> list[int]:
    """Ids of the first prompt that fits `longest` tokens, BOS or EOS counted; where none does the last, cut at its end
    as in training."""
    ids: list[int] = []
    for prompt in question.prompts:
        ids = tokenizer.encode_source(prompt)
        if len(ids) <= longest:
            return ids
    return [*ids[: longest - 1], ids[-1]] if tokenizer.ends_source else ids[:longest]
