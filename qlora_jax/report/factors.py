"""What a group of runs varies: keys of the config that change together are one factor, seeds are repetitions.

Keys change together where one of them fixes the other (alpha that follows r, the learning rate of a model's size), and
the two of a data type (quant.format, quant.double_quant) where not all their combinations are there.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

from qlora_jax.report.names import NAMED, freeze, is_number, key_name, level_name
from qlora_jax.report.source import Run

_DATA_TYPE = {"quant.format", "quant.double_quant"}
_MOST_LEVELS = 40  # of a factor; a key with more, each in few runs, is one that a search chose freely
# what the targets follow from that a run is scored on: of text,
_TEXT = (
    "data.format", "data.template", "data.turns", "data.template_date", "data.max_source_len", "data.max_target_len",
    "data.train_on_source", "data.batches", "data.added_tokens", "data.added_special_tokens",
)  # fmt: skip
_SET = ("data.path", "data.revision", "data.max_examples", "data.max_rows")
_MMLU = ("eval.mmlu_data", "eval.mmlu_split", "eval.mmlu_shots", "eval.mmlu_questions")


@dataclasses.dataclass(frozen=True)
class Factor:
    keys: tuple[str, ...]  # that change together, in the config's order
    shown: tuple[str, ...]  # of these, enough to tell the levels apart
    levels: tuple[tuple[Hashable, ...], ...]  # values of `shown`, ordered
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        if set(self.shown) == _DATA_TYPE:
            return "data type"
        return ", ".join(map(key_name, self.shown))

    @property
    def followers(self) -> tuple[str, ...]:
        """Keys that change with it and are not shown."""
        return tuple(key for key in self.keys if key not in self.shown)

    @property
    def is_numeric(self) -> bool:
        return all(is_number(value) for level in self.levels for value in level)

    def level(self, run: Run) -> int:
        return self._places[tuple(freeze(run.config.get(key)) for key in self.shown)]

    @property
    def _places(self) -> dict[tuple, int]:
        return self.__dict__.setdefault("_found", {level: place for place, level in enumerate(self.levels)})


@dataclasses.dataclass(frozen=True)
class Design:
    """What a group of runs varies."""

    factors: tuple[Factor, ...]  # without seeds
    seeds: Factor | None  # all seeds as one
    searched: tuple[str, ...]  # keys with a value of their own in nearly every run


def design(runs: Sequence[Run]) -> Design:
    values = varying(runs)
    seeds = tuple(key for key in values if is_seed(key))
    searched = tuple(
        key for key, found in values.items() if not is_seed(key) and len(found) > max(_MOST_LEVELS, len(runs) // 3)
    )
    keys = [key for key in values if key not in seeds and key not in searched]
    factors = tuple(_factor(part, runs) for part in _parts(keys, runs))
    return Design(factors, _factor(seeds, runs, all_shown=True) if seeds else None, searched)


def is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def varying(runs: Sequence[Run]) -> dict[str, dict[Hashable, None]]:
    """The keys that take several values in the runs, and these in order of appearance."""
    values: dict[str, dict[Hashable, None]] = {}
    for run in runs:
        for key, value in run.config.items():
            values.setdefault(key, {})[freeze(value)] = None
    return {key: found for key, found in values.items() if len(found) > 1}


def target_keys(runs: Sequence[Run], metric: str) -> tuple[str, ...]:
    """The keys that say what the runs are scored on, by a metric of theirs."""
    if metric.startswith("final_mmlu"):
        return _MMLU
    if metric == "final_train_loss":
        return (*_TEXT, *_SET)
    if metric.startswith("final_eval"):
        held_out = (*_TEXT, "data.eval_path", "data.eval_examples")
        return held_out if all(run.config.get("data.eval_path") for run in runs) else (*held_out, *_SET)
    return ()


def targets(run: Run, metric: str) -> tuple:
    """Runs with equal ones are scored on the same targets (of the same seed, where the split is drawn by it)."""
    return tuple(freeze(run.config.get(key)) for key in target_keys([run], metric))


def is_comparable(factor: Factor, runs: Sequence[Run], metric: str) -> bool:
    """Whether the levels of the factor are scored on the same targets."""
    return not set(target_keys(runs, metric)) & set(factor.keys)


def _parts(keys: Sequence[str], runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The keys in parts that change together."""
    columns = {key: [freeze(run.config.get(key)) for run in runs] for key in keys}
    counts = {key: len(set(column)) for key, column in columns.items()}
    parts: list[list[str]] = []
    for key in keys:
        joined = [part for part in parts if any(_together(key, other, columns, counts) for other in part)]
        parts = [part for part in parts if part not in joined]
        parts.append([*(other for part in joined for other in part), key])
    order = {key: place for place, key in enumerate(keys)}
    return sorted((tuple(sorted(part, key=order.__getitem__)) for part in parts), key=lambda part: order[part[0]])


def _together(a: str, b: str, columns: dict[str, list], counts: dict[str, int]) -> bool:
    pairs = len(set(zip(columns[a], columns[b], strict=True)))
    is_data_type = {a, b} == _DATA_TYPE and pairs < counts[a] * counts[b]
    return pairs == max(counts[a], counts[b]) or is_data_type


def _factor(keys: tuple[str, ...], runs: Sequence[Run], all_shown: bool = False) -> Factor:
    found = {tuple(freeze(run.config.get(key)) for key in keys): None for run in runs}
    # one key that tells all levels apart, the better known first (r before alpha), or else all of them
    alone = [key for place, key in enumerate(keys) if len({level[place] for level in found}) == len(found)]
    alone.sort(key=lambda key: NAMED.index(key) if key in NAMED else len(NAMED))
    shown = keys if all_shown or set(keys) == _DATA_TYPE else tuple(alone[:1]) or keys
    levels = list({tuple(freeze(run.config.get(key)) for key in shown): None for run in runs})
    levels = _ordered(shown, levels)
    labels = [level_name(shown, level) for level in levels]
    if len(set(labels)) < len(labels):
        labels = [", ".join(map(str, level)) for level in levels]
    return Factor(keys, shown, tuple(levels), tuple(labels))


def _ordered(shown: Sequence[str], levels: list[tuple]) -> list[tuple]:
    """Numbers by size (0 examples are all of them), anything else as the grid has it."""
    if not all(is_number(value) for level in levels for value in level):
        return levels
    is_amount = tuple(shown) == ("data.max_examples",)
    return sorted(levels, key=lambda level: (is_amount and level[0] == 0, *level))


def describe(config: dict[str, Any], keys: Sequence[str]) -> str:
    """ "r = 8, alpha = 16"."""
    return ", ".join(f"{key_name(key)} = {level_name([key], [config.get(key)])}" for key in keys)
