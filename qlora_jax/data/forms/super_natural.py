"""Super-NaturalInstructions: a task's definition and two positive examples before each of its instances.

The prompt is Tk-Instruct's ("def + 2 pos"), of Wang et al., 2022 (arXiv 2204.07705); source: its ni_collator.py.
"""

import random
import string
from typing import Any

from qlora_jax.data.fields import Pair, bad, kind, objects, text
from qlora_jax.data.rows import Row

INSTANCES = 100  # of a task: seeded ones; of the owners' test tasks their first, which are chosen for it
POSITIVE_EXAMPLES = 2
_TEST = "test_tasks.txt"  # in the name of a row's file: see data/task_lists


def super_natural(row: Row) -> list[Pair]:
    """A task's file {Definition, Positive Examples, Instances: [{input, output: [...]}]}; or a row of one instance
    {definition, inputs, targets}, as sets of the hub have them, which come without examples.

    The first output of an instance is learned. Where a prompt is too long its last example goes first.
    """
    if "Instances" not in row.fields:
        if "definition" not in row.fields:
            bad(row, "definition", 'no field "Instances" (with Definition) or "definition" (with inputs and targets)')
        sources = prompts(text(row, "definition"), [], text(row, "inputs", blank=True))
        answer = text(row, "targets", blank=True)
        return [Pair(sources[0], answer)] if answer.strip() else []
    definition, shown = definition_of(row), shown_examples(row)
    pairs = []
    for instance in chosen(objects(row, "Instances"), row.file):
        answer = outputs(instance)[0]
        first, *shorter = prompts(definition, shown, text(instance, "input", blank=True))
        if answer.strip():
            pairs.append(Pair(first, answer, shorter=tuple(shorter)))
    return pairs


def prompts(definition: str, examples: list[tuple[str, str]], given: str) -> list[str]:
    """The prompt of an instance with all examples, then with one less, and so on down to none."""
    begin = f"Definition: {ended(definition)}\n\n" if definition.strip() else ""
    shown = [
        f" Positive Example {number} -\n{ended(f'Input: {of.strip()}')}\n{ended(f' Output: {answer.strip()}')}\n\n"
        for number, (of, answer) in enumerate(examples, start=1)
    ]
    asked = f"Now complete the following example -\n{ended(f'Input: {given.strip()}')}\nOutput: "
    return [begin + "".join(shown[:count]) + asked for count in range(len(shown), -1, -1)]


def ended(part: str) -> str:
    """With a full stop, where no sign ends it."""
    part = part.rstrip() if part.endswith("\n") else part
    return part if part[-1] in string.punctuation else f"{part}."


def chosen(instances: list[Row], file: str) -> list[Row]:
    """At most INSTANCES of a task, `file` being the name of its file: the same in every run."""
    if len(instances) <= INSTANCES:
        return instances
    if _TEST in file:
        return instances[:INSTANCES]
    numbers = random.Random(file.rpartition(" ")[2].rpartition("/")[2]).sample(range(len(instances)), INSTANCES)
    return [instances[number] for number in sorted(numbers)]


def outputs(instance: Row) -> list[str]:
    """The references of an instance, at least one. Raises InputError where there is none, or no text."""
    value: Any = instance.fields.get("output")
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        bad(instance, "output", f"expected a list of texts in the field output, found {kind(value)}")
    return found


def definition_of(row: Row) -> str:
    """Of a task's file; of several definitions the first."""
    value = row.fields.get("Definition")
    if isinstance(value, list) and value and isinstance(value[0], str):
        return value[0].strip()
    return text(row, "Definition").strip()


def shown_examples(row: Row) -> list[tuple[str, str]]:
    """Input and output of the positive examples that a prompt shows at most."""
    examples = objects(row, "Positive Examples")[:POSITIVE_EXAMPLES]
    return [(text(each, "input", blank=True), text(each, "output", blank=True)) for each in examples]
