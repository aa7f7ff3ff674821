"""Random arrays from NumPy: XLA would compile a program for each shape, seconds long where axes are short.

Put on the device as they are: jnp.asarray compiles a program for each shape, too.
"""

import jax
import jax.numpy as jnp
import numpy as np


def random_normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Standard normal."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))
