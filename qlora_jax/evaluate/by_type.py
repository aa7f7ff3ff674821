"""Models by data types, without any finetuning: which evaluations a table is made of, and the table of their results.

A table (Table 2 and Figure 3 of the paper are such) is models times types; each cell is one run of `evaluate`, whose
result is a file. Its name has a hash of all that decides it, so a cell whose file is there is done.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from qlora_jax import checksums
from qlora_jax.errors import InputError


class Table(NamedTuple):
    """What is measured of which models."""

    name: str
    models: tuple[str, ...]  # hub names or folders
    quants: tuple[str, ...]  # of evaluate's --quant
    flags: tuple[str, ...]  # evaluate's others, as "--task=perplexity"

    @property
    def task(self) -> str:
        return next((flag.partition("=")[2] for flag in self.flags if flag.startswith("--task=")), "")


class Cell(NamedTuple):
    """One evaluation."""

    model: str
    quant: str
    arguments: tuple[str, ...]  # of evaluate, but for --out
    file: str  # name of its result

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What evaluate wrote, or None where it has not yet."""
        path = folder / self.file
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is no JSON ({error}): remove it, and it is measured again") from error


def cells(table: Table, more: Sequence[str] = (), contents: Mapping[str, str] | None = None) -> list[Cell]:
    """The evaluations of a table, model by model.

    Args:
      more: flags for all of them.
      contents: what else decides results, as checksums of files that flags name.
    Raises:
      InputError: the table says no task, or has the same cell twice.
    """
    if not table.task:
        raise InputError(f"{table.name}: its flags are {' '.join(table.flags)}; expected a --task=... among them")
    found = []
    for model in table.models:
        for quant in table.quants:
            arguments = (*table.flags, f"--model={model}", f"--quant={quant}", *more)
            digest = checksums.of(*arguments, *(f"{key} {value}" for key, value in sorted((contents or {}).items())))
            file = f"{model.strip('/').replace('/', '_')}-{quant}-{digest[:12]}.json"
            found.append(Cell(model, quant, arguments, file))
    if len({cell.file for cell in found}) < len(found):
        raise InputError(f"{table.name} names a model or a type twice")
    return found


def score(task: str, result: Mapping[str, Any]) -> float:
    """The number of a result that tables show: perplexity; accuracy over subjects, or the mean of it over tasks.

    Raises InputError for a result that has none.
    """
    try:
        if task == "perplexity":
            return float(result["perplexity"])
        if task == "mmlu":
            return float(result["accuracy_subjects"])
        if task == "lm-eval":
            return mean(float(found["acc,none"]) for found in result["results"].values())
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"a result of {task} has no number to show ({error!r})") from error
    raise InputError(f"--task={task}; tables are made of perplexity, mmlu or lm-eval")


def summary(table: Table, found: Mapping[tuple[str, str], float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a model a row, the mean over models last, for a type that all of them have."""
    rows = [
        [model, *(f"{found[model, quant]:.4f}" if (model, quant) in found else "" for quant in table.quants)]
        for model in table.models
    ]
    means = []
    for quant in table.quants:
        values = [found[model, quant] for model in table.models if (model, quant) in found]
        means.append(f"{mean(values):.4f}" if len(values) == len(table.models) else f"({len(values)} of {len(rows)})")
    return ["model", *table.quants], [*rows, ["mean", *means]]
