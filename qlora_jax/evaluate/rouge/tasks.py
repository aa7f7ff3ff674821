"""Answers of a model to questions, and their scores: each task's mean, and that of all questions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.evaluate.rouge.questions import Question, prompt_of
from qlora_jax.evaluate.rouge.score import exact_match, rouge_l
from qlora_jax.generate.decode import check_prompt, complete
from qlora_jax.generate.sampling import Sampling
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of some questions, in percent."""

    questions: int
    rouge_l: float
    exact_match: float


def answers(
    model: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    eos_ids: Sequence[int],
    source_len: int,
    new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's greedy answers, blanks around them left out.

    Args:
      model: any adapter on it counts.
      source_len: tokens of a prompt at most. new_tokens: of an answer at most.
    Raises:
      InputError: a prompt does not fit the model, or a number is out of range.
    """
    if source_len < 2:
        raise InputError(f"prompts of at most {source_len} tokens leave no room for a text; expected at least 2")
    asked = [prompt_of(question, tokenizer, source_len) for question in questions]
    for question, ids in zip(questions, asked, strict=True):
        check_prompt(ids, model, question.where)
    ends = complete(model, asked, Sampling(new_tokens, temperature=0), eos_ids, batch_size, progress=progress)
    return [tokenizer.decode(end.tokens).strip() for end in ends]


def scores(questions: Sequence[Question], given: Sequence[str]) -> tuple[Mean, dict[str, Mean]]:
    """Of all questions, and of each task in the order of the questions."""
    rows = [
        (question.task, rouge_l(answer, question.references), exact_match(answer, question.references))
        for question, answer in zip(questions, given, strict=True)
    ]
    names = dict.fromkeys(name for name, *_ in rows)
    return _mean(rows), {name: _mean([row for row in rows if row[0] == name]) for name in names}


def _mean(rows: Sequence[tuple[str, float, float]]) -> Mean:
    count = len(rows)
    return Mean(count, 100 * sum(row[1] for row in rows) / count, 100 * sum(row[2] for row in rows) / count)
