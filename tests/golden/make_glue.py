"""Makes glue/metrics.json: predictions and labels, and GLUE's metrics of them by scikit-learn and scipy.

scikit-learn 1.9.1, scipy 1.17.1, numpy 2.4.6, Python 3.11.

    python tests/golden/make_glue.py

A list of {"found": [n], "labels": [n], and by their names "accuracy", "f1", "matthews" (of two classes), or "pearson",
"spearman" (of numbers, some of them equal)}.
"""

import json
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

OUT = Path(__file__).parent / "glue" / "metrics.json"


def main() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for n, share in ((7, 0.5), (60, 0.2), (60, 0.9)):
        labels = (rng.random(n) < share).astype(int)
        found = np.where(rng.random(n) < 0.7, labels, 1 - labels)
        cases.append(
            {
                "found": found.tolist(), "labels": labels.tolist(), "accuracy": accuracy_score(labels, found),
                "f1": f1_score(labels, found), "matthews": matthews_corrcoef(labels, found),
            }
        )  # fmt: skip
    constant = np.ones(5, int)
    labels = np.array([1, 0, 1, 1, 0])
    cases.append(
        {"found": constant.tolist(), "labels": labels.tolist(), "matthews": matthews_corrcoef(labels, constant),
         "f1": f1_score(labels, constant), "accuracy": accuracy_score(labels, constant)}
    )  # fmt: skip
    for n in (6, 50):
        labels = np.round(5 * rng.random(n), 1)
        found = np.round(labels + rng.normal(size=n), 1)
        cases.append(
            {
                "found": found.tolist(), "labels": labels.tolist(),
                "pearson": float(pearsonr(found, labels)[0]), "spearman": float(spearmanr(found, labels)[0]),
            }
        )  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
