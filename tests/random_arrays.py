"""Random arrays from NumPy: XLA would compile a program for each shape, seconds long where axes are short."""

import jax
import jax.numpy as jnp
import numpy as np


def random_normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Standard normal."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))
