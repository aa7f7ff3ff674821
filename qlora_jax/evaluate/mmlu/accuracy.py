"""MMLU (Hendrycks et al., 2021): the answer is the likeliest of " A" to " D" after the prompt.

Intervals are 95%. Shares of questions (all, a category's, a subject's) have Wilson's. The mean over subjects takes the
subjects as given and their questions as drawn:

    mean = (1 / S) sum_s k_s / n_s,   variance = (1 / S^2) sum_s p_s (1 - p_s) / n_s,   p_s = (k_s + 2) / (n_s + 4)

and is mean +- 1.96 standard deviations, within 0..1. p_s is Agresti and Coull's, which gives subjects that are all
right or all wrong a variance too.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from qlora_jax.errors import InputError
from qlora_jax.evaluate.mmlu.data import LETTERS, Question, Questions
from qlora_jax.evaluate.mmlu.prompts import Prompts
from qlora_jax.evaluate.mmlu.subjects import CATEGORIES, SUBCATEGORIES, category
from qlora_jax.evaluate.scoring import choose, length_batches
from qlora_jax.evaluate.shares import Z, share


def answer(
    option_logits: Callable[..., Any],
    prompts: Prompts,
    batch_size: int | None = None,
    known: dict[int, list[float]] | None = None,
    keep: Callable[[dict[int, list[float]]], None] = lambda answered: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Logits of the four answers, float32 [questions, 4].

    Args:
      option_logits: of scoring.option_logits_of.
      batch_size: prompts of a batch; as many as make 8,192 tokens if None.
      known: logits of questions that need not be asked again, by number.
      keep: is given each batch's logits as they come.
      progress: called with (questions done, questions in all).
    Raises:
      InputError: a bad batch size, or logits that are not finite.
    """
    found = dict(known or {})
    batches = length_batches([len(ids) for ids in prompts.ids], batch_size)
    unknown = [batch for batch in batches if not found.keys() >= set(batch.numbers)]  # whole batches: the same sums
    progress(len(found), len(prompts.ids))
    for batch, logits in choose(option_logits, prompts.ids, prompts.options, unknown):
        if not np.isfinite(logits).all():
            raise InputError("logits that are not finite: the model's weights or adapter are broken")
        fresh = {n: row.tolist() for n, row in zip(batch.numbers, logits, strict=True) if n not in found}
        keep(fresh)
        found |= fresh
        progress(len(found), len(prompts.ids))
    return np.asarray([found[number] for number in range(len(prompts.ids))], np.float32)


@dataclasses.dataclass(frozen=True)
class Tally:
    """Right answers `k` of `n` questions."""

    k: int
    n: int

    def as_json(self) -> dict[str, Any]:
        found = share(self.k, self.n)
        return {"accuracy": found.share, "low": found.low, "high": found.high, "correct": self.k, "questions": self.n}


def results(questions: Sequence[Question], logits: np.ndarray) -> dict[str, Any]:
    """Accuracies, as they are written; logits float32 [questions, 4]. Equal logits count for the first letter."""
    right = [LETTERS[choice] == q.answer for q, choice in zip(questions, logits.argmax(axis=1), strict=True)]

    def tallies(name_of: Callable[[str], str], order: Iterable[str]) -> dict[str, Tally]:
        found = {
            name: [hit for hit, q in zip(right, questions, strict=True) if name_of(q.subject) == name] for name in order
        }
        return {name: Tally(sum(hits), len(hits)) for name, hits in found.items() if hits}

    subjects = tallies(lambda subject: subject, SUBCATEGORIES)
    parts = [part for group in CATEGORIES.values() for part in group]
    mean, low, high = subject_mean(list(subjects.values()))
    whole = share(sum(right), len(right))
    return {
        "accuracy_subjects": mean,
        "accuracy_subjects_interval": [low, high],
        "accuracy_questions": whole.share,
        "accuracy_questions_interval": [whole.low, whole.high],
        "correct": sum(right),
        "questions": len(right),
        "categories": {name: tally.as_json() for name, tally in tallies(category, CATEGORIES).items()},
        "subcategories": {n: tally.as_json() for n, tally in tallies(lambda s: SUBCATEGORIES[s], parts).items()},
        "subjects": {name: tally.as_json() for name, tally in subjects.items()},
    }


def subject_mean(subjects: Sequence[Tally]) -> tuple[float, float, float]:
    """Mean accuracy over subjects, with its interval's ends."""
    S = len(subjects)
    mean = sum(tally.k / tally.n for tally in subjects) / S
    smoothed = [(tally.k + 2) / (tally.n + 4) for tally in subjects]
    half = Z * math.sqrt(sum(p * (1 - p) / tally.n for p, tally in zip(smoothed, subjects, strict=True))) / S
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)


def sample(questions: Questions, count: int, seed: int) -> Questions:
    """`count` of the questions, drawn by the seed and kept in their order; all of them if count is 0."""
    if not 0 < count < len(questions.asked):
        return questions
    numbers = sorted(random.Random(seed).sample(range(len(questions.asked)), count))
    return Questions([questions.asked[number] for number in numbers], questions.shots)
