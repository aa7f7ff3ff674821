"""MMLU on the way: the model in training (4-bit base and adapter as they are, without dropout) answers questions.

It reads the state and changes nothing of it, so a run with questions ends with the bits of one without.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from qlora_jax import checksums
from qlora_jax.checksums import Input
from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu import accuracy as mmlu
from qlora_jax.evaluate.mmlu.data import SPLITS, Question, load_questions
from qlora_jax.evaluate.mmlu.prompts import Prompts, fitting, make_prompts
from qlora_jax.evaluate.scoring import length_batches, make_option_logits
from qlora_jax.mesh.place import Devices
from qlora_jax.mesh.processes import on_host
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.memory import Program


@dataclasses.dataclass(frozen=True)
class Asked:
    questions: list[Question]
    prompts: Prompts
    batch_size: int

    @property
    def input(self) -> Input:
        """What eval.mmlu_data stood for: the prompts and their answers."""
        answers = json.dumps([[question.subject, question.answer] for question in self.questions])
        content = checksums.of(answers, *(np.asarray(ids, np.int32).tobytes() for ids in self.prompts.ids))
        return Input(content, [("the questions or the tokenizer", content)])


def check(section: Any) -> None:
    """Raises InputError for values that the config's `eval` section cannot have."""
    if section.mmlu_split not in SPLITS:
        raise InputError(f"eval.mmlu_split is {section.mmlu_split!r}; expected {' or '.join(SPLITS)}")
    for key in ("mmlu_shots", "mmlu_questions", "mmlu_every"):
        if section[key] < 0:
            raise InputError(f"eval.{key} is {section[key]}; expected 0 or more")
    if section.mmlu_every and not section.mmlu_data:
        raise InputError("eval.mmlu_every is set, but eval.mmlu_data is empty; give MMLU's folder, file or hub name")


def read(config: Any, tokenizer: Tokenizer | Path, context: int, V: int, say: Callable[[str], None]) -> Asked:
    """The questions that the config asks for.

    `tokenizer`: the model's, or the folder it is in. `context`: the model's, tokens. `V`: rows of its embedding.
    """
    section = config.eval
    questions = load_questions(section.mmlu_data, section.mmlu_split, section.mmlu_shots)
    questions = mmlu.sample(questions, section.mmlu_questions, config.data.seed)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_folder(tokenizer)
    prompts = make_prompts(questions, section.mmlu_shots, tokenizer, context, V)
    subjects = len({question.subject for question in questions.asked})
    say(
        f"mmlu: {len(questions.asked):,} questions of {subjects} subjects, {section.mmlu_shots} shots; "
        f"{fitting(prompts)}"
    )
    return Asked(questions.asked, prompts, section.mmlu_batch_size)


def same(x: Any) -> Any:
    return x


class MMLU:
    """Asks the questions; `program` is compiled once a length."""

    def __init__(self, graph: Any, asked: Asked, devices: Devices | None = None, given: Callable[[Any], Any] = same):
        """`devices`: those of a mesh. `given`: puts an input where they take it."""
        self._asked, self._given = asked, given
        self._parts = 1 if devices is None else devices.shards.row_parts
        self.program = Program(make_option_logits(graph, devices))

    def __call__(self, adapter: Any, base: Any) -> dict[str, float]:
        """Accuracies, as a line of metrics.jsonl has them."""
        asked = self._asked
        with tqdm(total=len(asked.questions), desc="mmlu", unit="question", leave=False, delay=2) as bar:

            def progress(done: int, total: int) -> None:
                bar.update(done - bar.n)

            def option_logits(tokens: np.ndarray, last: np.ndarray, options: np.ndarray) -> np.ndarray:
                more = -len(tokens) % self._parts  # rows of padding, so that the devices have equally many
                arrays = np.pad(tokens, ((0, more), (0, 0))), np.pad(last, (0, more)), options
                return on_host(self.program(adapter, base, *map(self._given, arrays)))[: len(tokens)]

            logits = mmlu.answer(option_logits, asked.prompts, asked.batch_size, progress=progress)
        found = mmlu.results(asked.questions, logits)
        return {f"mmlu_{name}": found[name] for name in ("accuracy_subjects", "accuracy_questions", "questions")}

    def compile_largest(self, adapter: Any, base: Any) -> None:
        """The program of the longest prompts, so that its memory is known."""
        largest = length_batches([len(ids) for ids in self._asked.prompts.ids], self._asked.batch_size)[0]
        B = largest.B + -largest.B % self._parts
        shapes = ((B, largest.T), (B,), (len(self._asked.prompts.options),))
        self.program.compile(adapter, base, *(jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes))

    def describe(self, found: dict[str, float]) -> str:
        """The accuracies as a line for the user."""
        return (
            f"MMLU {found['mmlu_accuracy_subjects']:.1%} over subjects, {found['mmlu_accuracy_questions']:.1%} over "
            f"{found['mmlu_questions']:,} questions"
        )
