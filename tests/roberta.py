"""The golden RoBERTa checkpoints (tests/golden/make_roberta.py), and an encoder's logits."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from tests.conftest import TESTS

FOLDERS = TESTS / "golden" / "roberta"


def golden(name: str) -> dict[str, np.ndarray]:
    """rows.npz of a folder."""
    with np.load(FOLDERS / name / "rows.npz") as file:
        return dict(file)


@partial(jax.jit, static_argnames="graph")
def _classes(graph, state, tokens, lengths):
    return nnx.merge(graph, state).classes(tokens, lengths)


def classes_of(model, rows: dict[str, np.ndarray]) -> np.ndarray:
    """float32 [B, labels] of `golden` rows."""
    return np.asarray(_classes(*nnx.split(model), rows["tokens"], rows["lengths"]))
