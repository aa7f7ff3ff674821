"""Logits of rows in whatever batches they are computed."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.evaluate.glue.predict import logits_of
from qlora_jax.io.load import load_model
from tests.roberta import FOLDERS, golden

pytestmark = pytest.mark.quick_compile


def test_logits_are_those_of_each_row():
    rows = golden("regression")
    model = load_model(FOLDERS / "regression", compute_dtype=jnp.float32)
    examples = [
        Example(np.append(tokens[:length], 99).astype(np.int32), np.arange(length + 1) == length, f"x, line {number}")
        for number, (tokens, length) in enumerate(zip(rows["tokens"], rows["lengths"], strict=True))
    ]
    done = []
    found = logits_of(model, examples, 3, lambda some, total: done.append((some, total)))
    np.testing.assert_allclose(found, rows["base"], atol=1e-4, rtol=0)
    assert done == [(3, 4), (4, 4)]
    with pytest.raises(InputError, match="no head over classes"):
        logits_of(load_model(FOLDERS / "masked", compute_dtype=jnp.float32), examples)
