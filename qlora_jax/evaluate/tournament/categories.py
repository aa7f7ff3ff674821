"""Scores of systems by category of question: generic, coding, math and so on."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qlora_jax.data.read import read_rows
from qlora_jax.errors import InputError
from qlora_jax.evaluate.tournament.games import OUTCOMES
from qlora_jax.evaluate.tournament.verdicts import Verdict


def with_categories(verdicts: Sequence[Verdict], questions: Path) -> list[Verdict]:
    """The verdicts with the categories of a file of questions (question_id or item_id, and category).

    Raises:
      InputError: a file without these fields, or verdicts on an item that is not in it.
    """
    categories: dict[str, str] = {}
    for row in read_rows(str(questions)):
        item = row.fields.get("question_id", row.fields.get("item_id"))
        if item is None or not row.fields.get("category"):
            raise InputError(
                f"{row.where}: found the fields {', '.join(map(str, row.fields))}; expected question_id and category"
            )
        categories[str(item)] = str(row.fields["category"])
    missing = sorted({verdict.item for verdict in verdicts} - categories.keys())
    if missing:
        raise InputError(f"{questions}: no question {missing[0]}, which was judged ({len(missing)} items are missing)")
    return [dataclasses.replace(verdict, category=categories[verdict.item]) for verdict in verdicts]


def shares_won(verdicts: Sequence[Verdict], systems: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Categories [C], and percent [S, C] of its games that each system won in each, ties half; NaN without a game.

    Verdicts without a category are left out, and so are unparsed ones.
    """
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for verdict in verdicts:
        outcome = OUTCOMES.get(verdict.score)  # type: ignore[arg-type]
        if verdict.category and outcome is not None:
            sums[verdict.first, verdict.category].append(outcome)
            sums[verdict.second, verdict.category].append(1 - outcome)
    categories = sorted({category for _, category in sums})
    means = [[np.mean(sums[name, c]) if (name, c) in sums else np.nan for c in categories] for name in systems]
    return categories, 100 * np.array(means).reshape(len(systems), len(categories))


def points_over(verdicts: Sequence[Verdict], systems: Sequence[str], reference: str) -> tuple[list[str], np.ndarray]:
    """Categories [C], and each system's points in percent of the reference's [S, C], as `relative` counts them."""
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2))
    for verdict in verdicts:
        if verdict.category and isinstance(verdict.score, tuple) and reference in (verdict.first, verdict.second):
            first = verdict.second == reference
            system = verdict.first if first else verdict.second
            sums[system, verdict.category] += verdict.score if first else verdict.score[::-1]
    categories = sorted({category for _, category in sums})
    percents = np.full((len(systems), len(categories)), np.nan)
    for (system, category), (points, references) in sums.items():
        if references:
            percents[systems.index(system), categories.index(category)] = 100 * points / references
    return categories, percents
