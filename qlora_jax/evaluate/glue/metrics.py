"""GLUE's metrics: of predictions and labels, float64 [n] each, in the order of rows. As scikit-learn's and scipy's."""

import math
from collections.abc import Callable

import numpy as np

from qlora_jax.data.glue.tasks import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(found == labels))


def f1(found: np.ndarray, labels: np.ndarray) -> float:
    """Of class 1; 0 where neither predictions nor labels have it."""
    both = np.sum((found == 1) & (labels == 1))
    either = np.sum(found == 1) + np.sum(labels == 1)
    return float(2 * both / either) if either else 0.0


def matthews(found: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation of two classes; 0 where predictions or labels are all of one."""
    return pearson(found, labels)


def pearson(found: np.ndarray, labels: np.ndarray) -> float:
    """0 where one of both is constant, for which it is not defined."""
    if np.ptp(found) == 0 or np.ptp(labels) == 0:
        return 0.0
    a, b = found - np.mean(found), labels - np.mean(labels)
    return float(np.sum(a * b) / math.sqrt(np.sum(a * a) * np.sum(b * b)))


def spearman(found: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's of ranks; equal values share the mean of theirs."""
    return pearson(_ranks(found), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    ACCURACY: accuracy,
    F1: f1,
    MATTHEWS: matthews,
    PEARSON: pearson,
    SPEARMAN: spearman,
}
