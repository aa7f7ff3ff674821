"""The update of a page with 8-bit state keeps no float32 copy of a moment: compiled for an A6000 that is not here."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.optim.eightbit import adamw8bit
from qlora_jax.planning import topology
from qlora_jax.planning.gpus import GPUS

if not topology.is_installed():
    pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin", allow_module_level=True)


def test_temporary_bytes_a_parameter():
    """Two moments in float32 would take 8 bytes beside the 4 of the direction, which is added in the same pass."""
    tx, gpu = adamw8bit(2e-4, 0.9, 0.999, 1e-8, 0.0), GPUS["a6000"]
    params = [jax.ShapeDtypeStruct((8, 64, 4096), jnp.float32)]

    @partial(jax.jit, donate_argnums=(0, 2))
    def update(params, gradients, state):
        updates, state = tx.update(gradients, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    arguments = topology.on_gpu(gpu, (params, params, jax.eval_shape(tx.init, params)))
    compiled = topology.compile_for(gpu, update, *arguments)
    assert compiled.memory_analysis().temp_size_in_bytes / params[0].size < 4.5
