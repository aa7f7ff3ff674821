"""Scores: of rows by their task's metrics, of a task by the mean of these, of GLUE by the mean over tasks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.data.glue.tasks import Task
from qlora_jax.errors import InputError
from qlora_jax.evaluate.glue.metrics import METRICS


def predictions(task: Task, logits: np.ndarray) -> np.ndarray:
    """float64 [n]: the likeliest class of logits [n, labels], or the number itself.

    Raises InputError where the head has other labels than the task.
    """
    if logits.shape[1] != task.classes:
        raise InputError(
            f"the model's head has {logits.shape[1]} labels, and {task.name} has {task.classes}: the adapter was "
            "trained for another task"
        )
    return (logits.argmax(axis=1) if task.labels else logits[:, 0]).astype(np.float64)


def measured(task: Task, found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics of predictions and labels, float64 [n] each."""
    return {name: METRICS[name](found, labels) for name in task.metrics}


def score(task: Task, sets: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the task's metrics over its sets of rows: of MNLI those that match and those that do not."""
    return float(np.mean([one[name] for one in sets for name in task.metrics]))


def over_tasks(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """{"scores": {task: mean score over its results}, "runs": {task: results}, "mean": over tasks} of results of
    `evaluate --task=glue`. Raises InputError where one is none."""
    scores: dict[str, list[float]] = {}
    for number, result in enumerate(results):
        if result.get("task") != "glue" or not isinstance(result.get("score"), float) or "glue_task" not in result:
            raise InputError(f"result {number + 1} is none of evaluate --task=glue (it has no glue_task and score)")
        scores.setdefault(str(result["glue_task"]), []).append(result["score"])
    if not scores:
        raise InputError("no results are given")
    means = {name: float(np.mean(some)) for name, some in scores.items()}
    runs = {name: len(some) for name, some in scores.items()}
    return {"scores": means, "runs": runs, "mean": float(np.mean([*means.values()]))}
