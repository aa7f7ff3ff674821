"""The golden checkpoints of T5, and what of a model is held against them."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from qlora_jax.models.t5.rows import split_rows
from tests.conftest import TESTS

FAST = {"xla_backend_optimization_level": 0}
FOLDERS = TESTS / "golden" / "t5"


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDERS / name / "golden.npz") as file:
        return dict(file)


@partial(jax.jit, static_argnames="graph", compiler_options=FAST)
def _logits(graph, state, tokens, loss_mask):
    model = nnx.merge(graph, state)
    rows = split_rows(tokens, loss_mask, model.config.kind.pair)
    return model.logits(model.decode(rows.inputs, model.encode(rows.source, rows.seen), rows.seen)), rows.counted


def logits_of(model, tokens: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of the answers' tokens, the first in front; zero where there are none."""
    logits, counted = _logits(*nnx.split(model), tokens, loss_mask)
    return np.where(counted[..., None], logits, 0)
