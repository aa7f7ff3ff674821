"""Pages on a real GPU: the same bits wherever they live, host memory read in place (make gpu-check)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim.paged import PagedOptimizer
from qlora_jax.optim.pages import Pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU: host and device memory are one"),
]

SHAPES = {"a": (64, 64, 16384), "b": (64, 16384, 64)}  # 0.5 GiB of parameters, 1 GiB of Adam's state


def arrays(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    made = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}
    return jax.device_put(made, jax.devices()[0])


def optimizer(resident: float) -> PagedOptimizer:
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    return PagedOptimizer(Pages(optax.adamw(1e-3, weight_decay=0.0), params, 64 << 20), params, resident)


def test_same_bits_wherever_pages_live():
    results = []
    for resident in (0, 300 << 20, math.inf):
        paged, params = optimizer(resident), arrays(0)
        states = paged.init(params)
        for k in range(3):
            params, states = paged.update(params, arrays(k + 1), states, 0.5)
        results.append([np.asarray(x) for x in jax.tree.leaves((params, states))])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_checkpoint_reads_host_memory_in_place():
    paged = optimizer(0)
    for x in jax.tree.leaves(paged.init(arrays(0))):
        if x.ndim:
            assert np.asarray(x).__array_interface__["data"][0] == x.unsafe_buffer_pointer()
