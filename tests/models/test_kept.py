"""What is kept of a layer, joined in few arrays, comes apart as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.kept import joined, taken_apart

pytestmark = pytest.mark.quick_compile


def test_values_that_differ_in_their_first_axis_alone_share_an_array():
    kept = {
        "x": jnp.arange(24.0).reshape(2, 3, 4),
        "attended": jnp.ones((2, 3, 4)),
        "low_rank 0": jnp.full((3, 6, 2), 2.0),
        "low_rank 1": jnp.full((1, 6, 2), 3.0),
        "half": jnp.ones((2, 3, 4), jnp.bfloat16),
    }
    groups = joined(kept)
    assert [group.values.shape for group in groups] == [(4, 3, 4), (4, 6, 2), (2, 3, 4)]
    _, stacked = jax.lax.scan(lambda carry, _: (carry, groups), 0, length=2)  # as the layers' scan keeps them
    found = taken_apart(jax.tree.map(lambda values: values[1], stacked))
    assert found.keys() == kept.keys()
    jax.tree.map(np.testing.assert_array_equal, found, kept)
    assert found["half"].dtype == jnp.bfloat16
