"""Metrics against scikit-learn's and scipy's values, and scores."""

import json

import numpy as np
import pytest

from qlora_jax.data.glue.tasks import TASKS
from qlora_jax.errors import InputError
from qlora_jax.evaluate.glue.metrics import METRICS
from qlora_jax.evaluate.glue.score import measured, over_tasks, predictions, score
from tests.conftest import TESTS

CASES = json.loads((TESTS / "golden" / "glue" / "metrics.json").read_text())


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    cases = [case for case in CASES if name in case]
    assert len(cases) >= 2
    for case in cases:
        found, labels = (np.asarray(case[key], np.float64) for key in ("found", "labels"))
        assert METRICS[name](found, labels) == pytest.approx(case[name], abs=1e-12)


def test_a_constant_correlates_with_nothing():
    assert METRICS["pearson"](np.ones(3), np.arange(3.0)) == METRICS["spearman"](np.ones(3), np.arange(3.0)) == 0


def test_scores():
    """MNLI's is the mean of its two sets, MRPC's of accuracy and F1; GLUE's is over tasks, whatever their seeds."""
    logits = np.array([[0.1, 0.2, 0.9], [0.5, 0.1, 0.2]])
    mnli = TASKS["mnli"]
    assert predictions(mnli, logits).tolist() == [2, 0]
    sets = [measured(mnli, predictions(mnli, logits), np.array(labels)) for labels in ([2, 0], [2, 1])]
    assert score(mnli, sets) == 0.75
    assert score(TASKS["mrpc"], [{"accuracy": 0.5, "f1": 0.7}]) == pytest.approx(0.6)
    runs = [("rte", 0.5), ("rte", 0.7), ("mrpc", 0.9)]
    found = over_tasks({"task": "glue", "glue_task": name, "score": value} for name, value in runs)
    assert found["scores"]["rte"] == pytest.approx(0.6) and found["mean"] == pytest.approx(0.75)


def test_what_has_no_score():
    with pytest.raises(InputError, match="head has 3 labels, and rte has 2"):
        predictions(TASKS["rte"], np.zeros((1, 3)))
    with pytest.raises(InputError, match="result 1 is none of evaluate --task=glue"):
        over_tasks([{"task": "mmlu"}])
