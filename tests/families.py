"""The golden checkpoints of all families, and logits of a model."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from tests.conftest import TESTS

FAST = {"xla_backend_optimization_level": 0}
FOLDERS = TESTS / "golden" / "families"


@partial(jax.jit, static_argnames="graph", compiler_options=FAST)
def _logits(graph, state, tokens):
    model = nnx.merge(graph, state)
    return model.logits(model(tokens)[0])


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""
    return np.asarray(_logits(*nnx.split(model), tokens))
